"""What is known of an operation of ATen by its schema: its name, its inputs, what it changes, whether it can be repeated.

Names of torch without an underscore are missing for the nodes of autograd; without the private ones less is known.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics.names import tensors_in
from gradwatch.measure.wrappers import local_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

# operations that write what was asked for; infinities that they write are on purpose
_UNINITIALISED = frozenset(
    (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "empty_permuted",
        "resize",
    )
)
_WRITERS = _UNINITIALISED.union(
    (
        "fill",
        "full",
        "full_like",
        "new_full",
        "masked_fill",
        "scalar_tensor",
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "constant_pad_nd",
        "index_fill",
    )
)
# operations that only add and multiply what they get, or divide by what they get as well
_LINEAR = frozenset(
    (
        *("add", "addmm", "baddbmm", "bmm", "clone", "convolution", "convolution_backward", "dot", "mm", "mul", "mv"),
        *("neg", "sub", "sum", "threshold_backward"),
        *("avg_pool2d", "batch_norm", "mean", "native_batch_norm_backward", "native_layer_norm_backward", "layer_norm"),
    )
)
# operations that return nothing larger than what they get
_BOUNDED = frozenset(
    (
        *(
            "cat",
            "clamp_min",
            "gather",
            "hardtanh",
            "index",
            "index_select",
            "max_pool2d_with_indices",
            "relu",
            "sigmoid",
        ),
        *("stack", "tanh", "where"),
    )
)
_EPS = 1e-12  # of a normalisation that divides by nothing smaller
# operations that multiply what they get, which infinities of a mask do not meet
_MULTIPLIES = frozenset(
    (
        *("addmm", "addmv", "baddbmm", "bmm", "convolution", "dot", "mkldnn_rnn_layer", "mm", "mul", "mv"),
        *("batch_norm", "group_norm", "layer_norm", "rms_norm"),
    )
)
_RUNNING = frozenset(("running_mean", "running_var"))  # which batch normalisation only changes while it trains
_TAME = 1e6  # numbers of which sums of products do not overflow in float32
_PLAIN = {
    "log_softmax_backward_data": "log_softmax",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "native_batch_norm_legit": "batch_norm",
    "batch_norm_with_update": "batch_norm",
    "native_batch_norm_legit_functional": "batch_norm",
    "fused_rms_norm": "rms_norm",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss2d",
    "cdist_forward": "cdist",
    "euclidean_dist": "cdist",
    "scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention",
    "linalg_eigh": "eigh",
    "weight_norm_interface": "weight_norm",
}


@cache
def name_of(func: Any) -> str:
    """Return the name of an operation as users know it, such as "softmax"."""
    return plain_op(func._schema.name)


def plain_op(name: str) -> str:
    """Return the name of an operation without namespace, underscores and words for its inner form."""
    name = name.rpartition("::")[2]
    if name.startswith("_foreach_"):
        return name.removeprefix("_foreach_").rstrip("_")
    name = name.strip("_")
    return _PLAIN.get(name, name)


def forward_of(node: str) -> str:
    """Return the operation whose backward a node of autograd is, such as "log" for LogBackward0."""
    name = node.rpartition("::")[2]
    if name == "AccumulateGrad":
        return "accumulate_grad"
    name = re.sub(r"Backward\d*$", "", name)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if not hasattr(torch.ops.aten, snake) and hasattr(torch.ops.aten, snake.replace("_", "")):  # log1_p
        snake = snake.replace("_", "")
    return plain_op(snake)


@cache
def is_view(func: Any) -> bool:
    """Return whether an operation returns another view of its input and changes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


@cache
def _changes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


@cache
def is_collective(func: Any) -> bool:
    """Return whether an operation is one of several processes."""
    return str(func._schema.name).startswith(("c10d::", "_c10d_functional::", "c10d_functional::"))


@cache
def is_of_profiler(func: Any) -> bool:
    """Return whether an operation only tells a profiler where a program is; its tensors are no numbers."""
    return str(func._schema.name).startswith("profiler::")


@cache
def is_random(func: Any) -> bool:
    """Return whether an operation draws from a generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def can_repeat(func: Any) -> bool:
    """Return whether an operation gives the same result when it is run again on copies of its inputs, in this process alone."""
    return not is_random(func) and not is_collective(func) and name_of(func) not in _UNINITIALISED


def only_passes_on(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], bad: Sequence[Tensor]) -> bool:
    """Return whether an operation makes nothing non-finite of the finite numbers in what it gets, by their size."""
    if name_of(func) in _BOUNDED:
        return True
    if name_of(func) not in _LINEAR or any(
        one.dtype not in (torch.float32, torch.bfloat16, torch.float64) for one in bad
    ):
        return False
    scalars = scalars_of(func, args, kwargs)
    numbers = [one for one in scalars.values() if isinstance(one, float)]
    if scalars.get("eps", 1.0) < _EPS or not all(-_TAME < one < _TAME for one in numbers):
        return False
    for one in tensors:
        here = one.detach()
        if not here.is_floating_point() or not here.numel():
            continue
        known = here.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) if any(one is other for other in bad) else here
        if not torch.linalg.vector_norm(known).item() < _TAME:
            return False
    return True


@cache
def multiplies(func: Any) -> bool:
    """Return whether an operation multiplies all that it gets with each other."""
    return name_of(func) in _MULTIPLIES


@cache
def is_writer(func: Any) -> bool:
    """Return whether what an operation writes was asked for by a number."""
    return name_of(func) in _WRITERS


@cache
def is_uninitialised(func: Any) -> bool:
    """Return whether an operation returns memory as it finds it."""
    return name_of(func) in _UNINITIALISED


def named_inputs(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on which the result of an operation depends, by their names in its schema."""
    given = list(_arguments(func, args, kwargs))
    training = any(argument.name == "training" and value is True for argument, value in given)
    for argument, value in given:
        if training and argument.name in _RUNNING:
            continue
        if isinstance(value, (torch.Tensor, list, tuple)) and not argument.kwarg_only:
            yield from tensors_in(value, argument.name.replace("self", "input"))


def scalars_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the other arguments of an operation: numbers, dimensions, flags."""
    plain = (int, float, bool, str, type(None))
    return {
        argument.name: value
        for argument, value in _arguments(func, args, kwargs)
        if isinstance(value, plain) or (isinstance(value, (list, tuple)) and all(isinstance(v, plain) for v in value))
    }


def signs_of(values: Iterable[Tensor | None]) -> dict[str, Any]:
    """Return whether any number is infinite with a positive sign, as none of a mask is, by the name that it has in a mark."""
    return {"above": True} if any(bool(torch.isposinf(one).any()) for one in values if one is not None) else {}


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    declared = func._schema.arguments
    yield from zip(declared, args, strict=False)
    yield from ((one, kwargs[one.name]) for one in declared[len(args) :] if one.name in kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operation has returned."""
    for _, one in tensors_in(value):
        yield one


def changed_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation changes in place."""
    if not _changes(func):
        return []
    return [
        one
        for argument, value in _arguments(func, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
        for one in tensors(value)
    ]


def copied(args: Any, kwargs: Any, changed: Sequence[Tensor]) -> tuple[tuple[Any, Any], dict[int, Tensor]]:
    """Return arguments with copies of the tensors that are about to be changed, and the tensors by the ids of their copies."""
    copies = {id(one): local_of(one.detach()).clone() for one in changed}
    return _with(copies, (args, kwargs)), {id(copies[id(one)]): one for one in changed}


def repeated(func: Any, args: Any, kwargs: Any, bad: Sequence[Tensor], finite: float) -> Any:
    """Run an operation again, with ``finite`` in place of the non-finite elements of the tensors in ``bad``."""
    changed = changed_by(func, args, kwargs)
    with torch.no_grad():
        copies = {id(one): one.detach().clone() for one in changed}
        copies |= {id(one): one.detach().nan_to_num(nan=finite, posinf=finite, neginf=finite) for one in bad}
        args, kwargs = _with(copies, (args, kwargs))
        result = func(*args, **kwargs)
    return (result, changed_by(func, args, kwargs)) if changed else result


def _with(copies: dict[int, Tensor], value: Any) -> Any:
    """Return arguments in which tensors are replaced by their copies."""
    if isinstance(value, torch.Tensor):
        return copies.get(id(value), value)
    if isinstance(value, dict):
        return {key: _with(copies, one) for key, one in value.items()}
    return type(value)(_with(copies, one) for one in value) if isinstance(value, (list, tuple)) else value


def current_node() -> Any:
    """Return the node of autograd whose backward is running on this thread; None outside of one."""
    found = getattr(torch._C, "_current_autograd_node", None)
    return found() if found is not None else None


def next_node() -> int:
    """Return the number that autograd will give to the next node; 0 if it is not known."""
    found = getattr(torch.autograd, "_get_sequence_nr", None)
    return int(found()) if found is not None else 0
