"""Whether two graphs of autograd are the same: the same nodes, in the same places, which keep the same values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics import ops
from gradwatch.forensics.graph_walk import saved_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Place = tuple[Any, int]  # a node, and which of its outputs

_MOST = 4096  # nodes


def is_same_graph(
    roots: Sequence[Place], others: Sequence[Place], ends: Sequence[Place], other_ends: Sequence[Place]
) -> bool:
    """Return whether the graphs of two lists of places are the same down to two lists of others, which stand for each other.

    Of a graph that was freed by its backward, only nodes and places are compared.
    """
    places = {one: number for number, one in enumerate(ends) if one[0] is not None}
    other_places = {one: number for number, one in enumerate(other_ends) if one[0] is not None}
    if len(roots) != len(others) or len(ends) != len(other_ends):
        return False
    ahead = list(zip(roots, others, strict=True))
    seen = set(ahead)
    while ahead:
        here, there = ahead.pop()
        if places.get(here) != other_places.get(there) or (here[0] is None) != (there[0] is None):
            return False
        if here[0] is None or here in places:
            continue
        if here[1] != there[1] or not _is_same_node(here[0], there[0]) or len(seen) > _MOST:
            return False
        for pair in zip(here[0].next_functions, there[0].next_functions, strict=True):
            if pair not in seen:
                seen.add(pair)
                ahead.append(pair)
    return True


def place_of(tensor: Tensor) -> Place:
    """Return the node that has made a tensor, and which of its outputs it is; a leaf has a node that accumulates."""
    if not tensor.requires_grad:
        return None, 0
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _is_same_node(one: Any, other: Any) -> bool:
    if ops.forward_of(one.name()) != ops.forward_of(other.name()) or len(one.next_functions) != len(
        other.next_functions
    ):
        return False
    if hasattr(one, "variable"):
        return one.variable is other.variable
    if isinstance(one, torch.autograd.function.BackwardCFunction):
        return True  # what it keeps is the user's affair
    kept, again = saved_in(one), saved_in(other)
    # what an operation returns for its backward alone may hold memory that it never writes, as that of ctc_loss does
    return all(
        _is_same_value(kept[name], again[name]) for name in (kept.keys() & again.keys()) - {"result1", "result2"}
    )


def _is_same_value(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.is_complex() != other.is_complex():
            return False
        if one.dtype != other.dtype:  # watched operations may keep lengths as integers
            one, other = one.double(), other.double()
        if not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        return torch.allclose(one.detach(), other.detach(), rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same_value, one, other))
    if isinstance(one, (int, float, str, bool, type(None))):
        return repr(one) == repr(other)
    return True
