"""Bounds of the numbers that nodes of a graph have returned: which of them were finite for certain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics import ops
from gradwatch.forensics.operands import is_nonfinite, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

# operations that return nothing larger than what they got
_KEEPS = frozenset(
    (
        *(
            "view",
            "unsafe_view",
            "reshape_alias",
            "expand",
            "squeeze",
            "unsqueeze",
            "t",
            "transpose",
            "permute",
            "select",
        ),
        *(
            "slice",
            "index",
            "gather",
            "neg",
            "abs",
            "relu",
            "clone",
            "alias",
            "unbind",
            "split",
            "mean",
            "cat",
            "stack",
        ),
        *("masked_select", "index_select", "to_copy", "max", "min", "amax", "amin", "sort", "topk", "leaky_relu"),
    )
)
_UNIT = frozenset(("sigmoid", "tanh", "sin", "cos", "softmax", "sign", "erf"))  # nothing larger than 1
_SUMS = frozenset(("add", "sub"))
_PRODUCTS = frozenset(("mul", "mm", "bmm", "dot", "mv"))
_MUTE = frozenset(("masked_fill", "where"))  # may write an infinity on purpose
_ROOM = 0.5  # of the range of a dtype, since a sum has rounding errors


class Bounds:
    """Bounds of the outputs of nodes.

    Args:
        known: outputs that are known, by their nodes.
        kept: returns what a node keeps.
        output: returns the output of an operation, if it can be found from what its node keeps.
    """

    def __init__(
        self,
        known: Mapping[Any, Tensor],
        kept: Callable[[Any], dict[str, Any]],
        output: Callable[[str, dict[str, Any]], Tensor | None],
    ) -> None:
        self._known = known
        self._kept = kept
        self._output = output
        self._found: dict[tuple[Any, bool], float | None] = {}

    def of(self, node: Any, *, mute: bool = False) -> float | None:
        """Return a bound of the absolute values that a node has returned; None if they may not have been finite.

        With ``mute``, infinities that may have been written on purpose are left out.
        """
        key = node, mute
        if key not in self._found:
            self._found[key] = None  # while it is being found out
            self._found[key] = self._find(node, mute)
        return self._found[key]

    def is_safe(self, node: Any) -> bool:
        """Return whether a node returns finite numbers for whatever finite ones it gets."""
        op = ops.forward_of(node.name())
        if op == "mean":  # it is a sum first, which float16 has in float32
            count = self._kept(node).get("self_sym_numel") or math.inf
            largest = max((_most(below) for below, _ in node.next_functions), default=math.inf)
            return _dtype_of(node) is torch.float16 or count * largest < _ROOM * _range_of(node)
        return op in _UNIT or (op in _KEEPS and (op != "to_copy" or _range_of(node) > torch.finfo(torch.float16).max))

    def has_finite_inputs(self, node: Any) -> bool:
        """Return whether all that a node got from other nodes is finite for certain."""
        return all(self.of(below) is not None for below, _ in node.next_functions if below is not None)

    def has_unknown_input(self, node: Any) -> bool:
        """Return whether a node got a tensor that is not kept, so that it may have been anything."""
        op = ops.forward_of(node.name())
        if op in _PRODUCTS:
            return all(below is None for below, _ in node.next_functions) or self._factor(node) is None
        return op in _SUMS | _MUTE or op not in _KEEPS | _UNIT

    def _find(self, node: Any, mute: bool) -> float | None:  # noqa: FBT001
        known = self._known.get(node)
        known = node.variable if known is None and hasattr(node, "variable") else known
        op = ops.forward_of(node.name())
        if known is None and op != "div":
            known = self._output(op, self._kept(node))
        if known is not None:
            return _largest(known)
        below = [self.of(one, mute=mute) for one, _ in node.next_functions if one is not None]
        whole = len(below) == len(node.next_functions)
        bound = self._combined(node, op, below, whole, mute)
        return bound if bound is not None and bound < _ROOM * _range_of(node) else None

    def _combined(self, node: Any, op: str, below: list[float | None], whole: bool, mute: bool) -> float | None:  # noqa: FBT001
        bounds = [one for one in below if one is not None]
        if not bounds or len(bounds) < len(below):
            return None
        bound = None
        if op in _UNIT:
            bound = 1.0
        elif op in _KEEPS or (mute and op in _MUTE):
            bound = max(bounds)
        elif op in _SUMS and whole:
            bound = sum(bounds)
        elif op == "mul" and whole:
            bound = math.prod(bounds)
        elif op == "sum" and (sizes := self._kept(node).get("self_sym_sizes")) is not None:
            bound = bounds[0] * math.prod(sizes)
        elif op in _PRODUCTS and (factor := self._factor(node)) is not None:
            bound = factor * bounds[0]
        return bound

    def _factor(self, node: Any) -> float | None:
        """Return by how much a product with a tensor that needs no gradient can enlarge the other one; None if it is not kept."""
        kept = self._kept(node)
        other = next(
            (kept[name] for name in ("other", "mat2", "self", "vec") if isinstance(kept.get(name), torch.Tensor)), None
        )
        largest = _largest(other) if other is not None else None
        if largest is None or other is None:
            return None
        return largest * (1 if ops.forward_of(node.name()) == "mul" else max(other.shape, default=1))


def _largest(tensor: Tensor) -> float | None:
    if not tensor.numel():
        return 0.0
    if is_nonfinite(tensor):
        return None
    here = plain(tensor)
    here = tensor.detach().double() if here is None else here
    return max(abs(float(end.item())) for end in torch.aminmax(here))


def _most(node: Any) -> float:
    """Return the largest finite number that a node can have returned, by its dtype and by narrower ones before."""
    largest = math.inf
    while node is not None:
        largest = min(largest, torch.finfo(kind).max if (kind := _dtype_of(node)) is not None else math.inf)
        below = node.next_functions
        node = below[0][0] if ops.forward_of(node.name()) in _KEEPS and len(below) == 1 else None
    return largest


def _dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of what a node has returned; None if it is not known."""
    try:
        found: torch.dtype = node._input_metadata[0].dtype
    except (AttributeError, IndexError, RuntimeError):
        return None
    return found if found.is_floating_point else None


def _range_of(node: Any) -> float:
    """Return the largest number of the dtype that a node has returned; of the narrowest if it is not known."""
    return float(torch.finfo(_dtype_of(node) or torch.float16).max)
