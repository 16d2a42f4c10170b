"""What may be called and read while a loss is computed again: functions of torch and of Python that change nothing."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import nn

_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("abs", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min"),
        *("range", "reversed", "round", "sum", "tuple", "zip"),
    )
)
_TYPES = frozenset((torch.finfo, torch.iinfo, torch.device, torch.Size))
_CONTEXTS = (torch.autocast, torch.no_grad, torch.enable_grad)
# modules of torch that hold the functions of tensors
_SPACES = tuple(
    one
    for one in (getattr(torch._C, name, None) for name in ("_VariableFunctions", "_nn", "_linalg", "_special", "_fft"))
    if one is not None
)
_WRITTEN = frozenset(("torch.functional", "torch.nn.functional", "torch.linalg", "torch.special"))
# of a tensor: what does more than compute
_FORBIDDEN = frozenset(
    (
        *("backward", "retain_grad", "set", "apply", "map"),
        *("share_memory", "numpy", "data_ptr", "untyped_storage", "storage", "grad", "map2"),
    )
)
_IN_PLACE = frozenset(
    (
        *("abs_", "add_", "clamp_", "clamp_max_", "clamp_min_", "copy_", "div_", "exp_", "fill_", "index_add_"),
        *("index_copy_", "index_fill_", "log_", "masked_fill_", "mul_", "nan_to_num_", "neg_", "pow_", "relu_"),
        *("scatter_", "scatter_add_", "sqrt_", "sub_", "tril_", "triu_", "zero_"),
    )
)
_ATTRIBUTES = frozenset(
    (
        *("H", "T", "data", "device", "dtype", "imag", "is_cuda", "is_leaf", "itemsize", "layout"),
        *("mH", "mT", "names", "ndim", "real", "requires_grad", "shape"),
    )
)
_PLAIN = frozenset(
    (int, bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice, range, type(...))
)
_READS: dict[Any, frozenset[str]] = {
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("index", "count")),
    tuple: frozenset(("index", "count")),
    torch.Size: frozenset(("index", "count", "numel")),
    str: frozenset(("startswith", "endswith", "lower", "upper")),
}
# modules of torch that compute the same in each call and keep nothing
_MODULES = (
    "torch.nn.modules.loss",
    "torch.nn.modules.activation",
    "torch.nn.modules.distance",
    "torch.nn.modules.flatten",
    "torch.nn.modules.linear",
    "torch.nn.modules.conv",
    "torch.nn.modules.normalization",
    "torch.nn.modules.pooling",
    "torch.nn.modules.padding",
)
_MADE = frozenset(
    ("torch.nn.modules.loss", "torch.nn.modules.activation", "torch.nn.modules.distance")
)  # may be made anew
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LISTS = frozenset(("parameters", "named_parameters", "buffers", "named_buffers"))  # of a module
_MISSING = object()
_FIELD = type(NamedTuple("_Field", [("one", int)]).one)  # type: ignore[attr-defined]


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch's own class."""
    return type(value) in (torch.Tensor, nn.Parameter)


def is_plain(value: Any) -> bool:
    """Return whether operators on a value run no code of the user's."""
    kind = type(value)
    if is_tensor(value) or kind in _PLAIN or kind.__module__ == "numpy":
        return True
    if kind in _READS or kind.__module__ == "torch.return_types":
        return all(map(is_plain, value.values() if kind is dict else value))
    return False


def is_context(value: Any) -> bool:
    """Return whether a value is one of torch's context managers that a loss may be computed in."""
    return type(value) in _CONTEXTS


def makes_context(function: Any) -> bool:
    """Return whether a function is one that makes such a context manager."""
    return function in _CONTEXTS


def may_call(function: Any, keywords: dict[str, Any]) -> bool:
    """Return whether calling a function changes nothing, as its arguments are plain."""
    if isinstance(function, type):
        return function in _BUILTINS or function in _TYPES or function.__module__ in _MADE
    if isinstance(function, nn.Module):
        return _is_stateless(function)
    name, owner = str(getattr(function, "__name__", "_")), getattr(function, "__self__", None)
    if name.endswith("_") or keywords.get("out") is not None or keywords.get("inplace"):
        return False
    if is_tensor(owner):
        return name not in _FORBIDDEN and not name.startswith("register")
    return _is_function(function, name, owner)


def changed_in_place(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Return the tensor that a function of torch only changes in place; None if there is none or it may do more."""
    name, owner = str(getattr(function, "__name__", "_")), getattr(function, "__self__", None)
    if is_tensor(owner):
        return owner if name in _IN_PLACE else None
    known = getattr(F, name, _MISSING) is function and keywords.get("inplace") and keywords.get("out") is None
    return args[0] if known and args and is_tensor(args[0]) else None


def _is_function(function: Any, name: str, owner: Any) -> bool:
    if isinstance(function, types.MethodType):
        return name in _LISTS and function.__func__ is getattr(nn.Module, name, None)
    if isinstance(function, types.BuiltinFunctionType):
        return _is_builtin(function, name, owner)
    written = isinstance(function, types.FunctionType) and function.__module__ in _WRITTEN
    return written or getattr(F, name, _MISSING) is function


def _is_builtin(function: Any, name: str, owner: Any) -> bool:
    if type(owner) in _READS:
        return name in _READS[type(owner)]
    if function in _BUILTINS or getattr(math, name, None) is function:
        return True
    return any(getattr(one, name, None) == function for one in _SPACES)


def _is_stateless(module: nn.Module) -> bool:
    if any(getattr(module, name, None) for name in _HOOKS):
        return False
    if type(module) is nn.Sequential:
        return all(map(_is_stateless, module))
    return type(module).__module__ in _MODULES and not module._modules and not getattr(module, "inplace", False)


def attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of the user's.

    A method or a property of a class of the user's is returned as its function, bound to the object.

    Raises:
        LookupError: that is not possible.
    """
    if is_tensor(value):
        if name in _ATTRIBUTES or callable(getattr(torch.Tensor, name, None)):
            return getattr(value, name)
        raise LookupError(name)
    if isinstance(value, types.ModuleType):
        return value.__dict__[name] if name in value.__dict__ else _of_torch(value, name)
    if type(value) in _PLAIN or type(value) in _READS or type(value).__module__ in ("torch", "torch.return_types"):
        return getattr(value, name)
    if isinstance(value, nn.Module):
        for held in (value._parameters, value._buffers, value._modules):
            if name in held:
                return held[name]
        return getattr(value, name) if _lists(value, name) else _static(value, name)
    has_items = isinstance(value, dict) and _is_of(type(value), "__getattr__", "lightning")  # as its hparams
    return dict.__getitem__(value, name) if has_items else _static(value, name)


def _is_of(kind: type, method: str, library: str) -> bool:
    """Return whether a library has written a method of a class."""
    return str(getattr(getattr(kind, method, None), "__module__", "")).startswith(library)


def _lists(module: nn.Module, name: str) -> bool:
    return name in _LISTS and type(module).__dict__.get(name) is None


def _of_torch(module: types.ModuleType, name: str) -> Any:
    if not module.__name__.startswith("torch"):
        raise LookupError(name)
    return getattr(module, name)


def _static(value: Any, name: str) -> Any:
    try:
        found = inspect.getattr_static(value, name)
    except AttributeError as error:
        raise LookupError(name) from error
    if isinstance(value, type) and isinstance(found, (staticmethod, classmethod)):
        return found.__func__ if isinstance(found, staticmethod) else types.MethodType(found.__func__, value)
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, (types.MemberDescriptorType, _FIELD)):  # of a class with slots, and of a named tuple
        return found.__get__(value)
    own = name in getattr(value, "__dict__", {})
    if isinstance(found, types.FunctionType) and not own and not isinstance(value, type):
        return types.MethodType(found, value)
    if hasattr(type(found), "__get__") and not own and not isinstance(found, types.FunctionType):
        raise LookupError(name)  # a property or another descriptor
    return found


def getter_of(value: Any, name: str) -> types.FunctionType | None:
    """Return the function that computes a property of an object, other than one of torch's; None if it is none."""
    found = inspect.getattr_static(value, name, None)
    getter = found.fget if type(found) is property else None
    is_torchs = str(getattr(getter, "__module__", "torch")).partition(".")[0] == "torch"
    return getter if isinstance(getter, types.FunctionType) and not is_torchs else None


def is_missing(value: Any, name: str) -> bool:
    """Return whether an object has no attribute of this name, for certain."""
    kind: Any = type(value)
    if kind.__getattribute__ is not object.__getattribute__:
        return False
    if isinstance(value, nn.Module):
        held = any(name in one for one in (value._parameters, value._buffers, value._modules))
        own = held or kind.__getattr__ is not nn.Module.__getattr__
    else:
        own = hasattr(kind, "__getattr__")
    return not own and inspect.getattr_static(value, name, _MISSING) is _MISSING


def is_record(value: Any) -> bool:
    """Return whether a value has items without code of the user's: a list of modules, a named tuple, a dict of transformers."""
    kind = type(value)
    if kind in (nn.ModuleList, nn.ModuleDict, nn.Sequential):
        return True
    if isinstance(value, tuple):
        return hasattr(kind, "_fields") and kind.__getitem__ is tuple.__getitem__ and kind.__iter__ is tuple.__iter__
    return isinstance(value, OrderedDict) and _is_of(kind, "__getitem__", "transformers")


def item_of(record: Any, index: Any) -> Any:
    """Return an item of a record; those of a dict of transformers have a key and a number."""
    if isinstance(record, nn.Module):
        return record[index]  # type: ignore[index]
    if isinstance(record, tuple):
        return tuple.__getitem__(record, index)
    return OrderedDict.__getitem__(record, index) if type(index) is str else tuple(OrderedDict.values(record))[index]


def without_partial(function: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the function of a `functools.partial`, and the arguments that it adds."""
    if type(function) is functools.partial:
        return function.func, function.args, dict(function.keywords)
    return function, (), {}
