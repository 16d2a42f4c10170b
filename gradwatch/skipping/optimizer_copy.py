"""Copies of everything that an optimizer's step may change, to restore it in place and bit-identical."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.errors import words_of
from gradwatch.measure.wrappers import local_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST = 50_000  # most objects reachable from one optimizer
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "gradwatch"}  # packages whose objects are not inspected
_HOOKS = "_optimizer_"  # prefix of the attributes in which torch keeps the user's hooks


class Unreadable(Exception):  # noqa: N818  it is a finding, reported in a note
    """Raised if the contents of an optimizer cannot be copied; the message says why."""


class OptimizerCopy:
    """The contents of one optimizer: parameters, state and all other attributes, including optimizers inside it.

    Tensors, arrays and generators are copied. Of dicts, lists, sets and the attributes of objects that belong to the
    optimizer, the references are kept. Call all methods with autograd disabled.

    Args:
        optimizer: optimizer that is about to step.
        model: model whose other parameters the step must not change; None: there are none to check.
        tensors: False to copy no tensors, only to record whether they are written to. They can be copied later (`keep_tensors`);
            until then a tensor that was written to cannot be restored.

    Raises:
        Unreadable: something cannot be copied.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None, *, tensors: bool = True) -> None:
        self._package = type(optimizer).__module__.partition(".")[0]
        self._own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._seen: dict[int, Any] = {}
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []  # each with its memory and a copy
        self._marked: list[tuple[Tensor, tuple[int, int]]] = []  # tensors without a copy
        self._gradients: list[tuple[Tensor, Tensor | None]] = []  # of leaf tensors other than its parameters
        self._containers: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        try:
            self._keep(optimizer)
            if tensors:
                self.keep_tensors()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise Unreadable(f"the contents of the optimizer cannot be copied: {words_of(error)}") from error
        named = model.named_parameters() if model is not None else ()
        self._others = [(name, one, _mark(one)) for name, one in named if id(one) not in self._seen]

    def _keep(self, optimizer: Optimizer) -> None:
        waiting: list[tuple[Any, bool]] = [(optimizer, True)]
        while waiting:
            thing, owned = waiting.pop()
            if thing is None or isinstance(thing, (int, float, complex, str, bytes, type)) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            if len(self._seen) > _MOST:
                raise Unreadable(f"the optimizer holds more than {_MOST:,} objects")
            owned = owned or self._belongs(thing)
            waiting += [(inner, owned) for inner in self._look(thing, owned=owned)]

    def _belongs(self, thing: Any) -> bool:
        return isinstance(thing, Optimizer) or "param_groups" in getattr(thing, "__dict__", ())

    def _look(self, thing: Any, *, owned: bool) -> Iterable[Any]:
        """Copy one object, and return the objects that it contains."""
        if isinstance(thing, Tensor):
            return self._look_at_tensor(thing)
        if isinstance(thing, nn.Module):
            return (*thing.parameters(), *thing.buffers())
        if isinstance(thing, (dict, list, set, deque)):
            if owned:
                self._containers.append((thing, thing.copy() if isinstance(thing, deque) else type_of(thing)(thing)))
            return [*thing, *thing.values()] if isinstance(thing, dict) else list(thing)
        if isinstance(thing, (tuple, frozenset)):
            return thing
        if isinstance(thing, MethodType):
            return (thing.__self__,)
        if isinstance(thing, np.ndarray):
            self._arrays.append((thing, thing.copy()))
        elif isinstance(thing, torch.Generator):
            self._generators.append((thing, thing.get_state()))
        else:
            return self._look_at_object(thing, owned=owned)
        return ()

    def _look_at_tensor(self, tensor: Tensor) -> Iterable[Any]:
        self._marked.append((tensor, _mark(tensor)))
        inside: list[Any] = [vars(tensor)] if type(tensor) in (Tensor, nn.Parameter) and vars(tensor) else []
        if tensor.is_leaf and id(tensor) not in self._own:
            self._gradients.append((tensor, tensor.grad))
            inside.append(tensor.grad)
        return inside

    def _look_at_object(self, thing: Any, *, owned: bool) -> Iterable[Any]:
        """Return the objects that an object contains; its attributes are kept only if it belongs to the optimizer.

        The attributes of a logger or a trainer, for example, are not restored.
        """
        kind = type(thing)
        package = kind.__module__.partition(".")[0]
        its = isinstance(thing, Optimizer) or dataclasses.is_dataclass(kind) or package == self._package != "torch"
        if not its and package in _FOREIGN:  # functions too
            return ()
        inside = getattr(thing, "__dict__", {})
        if its and owned:
            self._containers.append((inside, dict(inside)))
            slots = [(thing, name, getattr(thing, name)) for name in _slots(kind) if hasattr(thing, name)]
            self._slots += slots
            return [*(inside[name] for name in inside if not name.startswith(_HOOKS)), *(one[2] for one in slots)]
        return list(inside.values())

    def keep_tensors(self) -> bool:
        """Copy the tensors that were not copied yet; return False if one was written to before that."""
        as_found = not any(_mark(tensor) != mark for tensor, mark in self._marked)
        self._tensors += [(tensor, tensor.detach(), tensor.detach().clone()) for tensor, _ in self._marked]
        self._marked.clear()
        return as_found

    def moved(self) -> bool:
        """Return True if a tensor has changed or was replaced, or was written to before it was copied."""
        return any(_mark(tensor) != mark for tensor, mark in self._marked) or any(
            not _same(tensor, held) or not torch.equal(held, copy) for tensor, held, copy in self._tensors
        )

    def counted(self) -> bool:
        """Return True if anything but a tensor has changed."""
        return (
            any(not _holds(container, kept) for container, kept in self._containers)
            or any(getattr(thing, name, None) is not value for thing, name, value in self._slots)
            or any(not np.array_equal(array, kept) for array, kept in self._arrays)
            or any(not torch.equal(generator.get_state(), state) for generator, state in self._generators)
        )

    def put_back(self) -> str:
        """Restore everything; return why something could not be restored, or ""."""
        problem = ""
        for container, kept in self._containers:
            _refill(container, kept)
        for thing, name, value in self._slots:
            object.__setattr__(thing, name, value)
        for tensor, held, copy in self._tensors:
            try:
                if not _same(tensor, held):
                    tensor.data = held
                held.copy_(copy)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                if not torch.equal(held, copy):  # an expanded tensor, whose elements share memory, cannot be written to
                    problem = f"a tensor of shape {tuple(tensor.shape)} could not be restored: {words_of(error)}"
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        for array, kept in self._arrays:
            array[...] = kept
        for generator, state in self._generators:
            generator.set_state(state)
        if any(_mark(tensor) != mark for tensor, mark in self._marked):
            problem = "the step has written to a tensor that was not copied"
        moved = next((name for name, one, mark in self._others if _mark(one) != mark), None)
        return problem or (f"the step changes {moved}, which is not a parameter of the optimizer" if moved else "")


def type_of(container: Any) -> type:
    """Return the built-in type (dict, list or set) of which a container is an instance."""
    return next(kind for kind in (dict, list, set) if isinstance(container, kind))


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        names = vars(one).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                yield name


def _holds(container: Any, kept: Any) -> bool:
    """Return True if a container holds the same objects in the same order as when it was copied."""
    if len(container) != len(kept):
        return False
    if isinstance(container, set):
        return bool(container == kept)
    pairs = zip(container, kept, strict=True)
    if isinstance(container, dict):
        return all(one is other and container[one] is kept[other] for one, other in pairs)
    return all(one is other for one, other in pairs)


def _refill(container: Any, kept: Any) -> None:
    if _holds(container, kept):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(kept)
    else:
        container.extend(kept)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return the version and the memory address of a tensor, which show whether it was written to or replaced."""
    local = local_of(tensor.detach())
    return local._version, local.data_ptr() if local.layout is torch.strided else 0


def _same(tensor: Tensor, held: Tensor) -> bool:
    """Return True if a tensor has the same memory, shape and strides as ``held``."""
    one, other = local_of(tensor.detach()), local_of(held)
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())
