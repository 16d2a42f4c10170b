"""The loss from which a backward starts, by the node of its graph."""

from __future__ import annotations

from typing import Any, NamedTuple

_KINDS = {
    "Nll": "cross-entropy",
    "BinaryCrossEntropy": "binary cross-entropy",
    "CrossEntropy": "cross-entropy",
    "CtcLoss": "CTC",
    "Mse": "squared error",
    "SmoothL1": "smooth L1",
    "Huber": "Huber",
    "KlDiv": "KL divergence",
}
_NEAR = 8  # nodes that are followed: a loss may be scaled, averaged or summed with a penalty


class SeenLoss(NamedTuple):
    """What the graph says of a loss.

    Attributes:
        kind: kind of the loss, such as "cross-entropy"; "" if it is not known.
        prediction: shape of the tensor that the loss compares with a target; empty if it is not known.
    """

    kind: str = ""
    prediction: tuple[int, ...] = ()


def seen_loss(roots: Any) -> SeenLoss:
    """Return what is known of the loss from the first nodes behind the roots of a backward."""
    roots = roots if isinstance(roots, (list, tuple)) else [roots]
    ahead = [getattr(root, "grad_fn", None) for root in roots]
    for _ in range(_NEAR):
        node = ahead.pop(0) if ahead else None
        if node is None:
            continue
        name = type(node).__name__
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if kind is not None:
            return SeenLoss(kind, _shape_before(node))
        ahead += [following for following, _ in node.next_functions]
    return SeenLoss()


def _shape_before(node: Any) -> tuple[int, ...]:
    """Return the shape of the first input of a node, which its gradient will have. No tensor is looked at."""
    before = next((before for before, _ in node.next_functions if before is not None), None)
    told: Any = getattr(before, "_input_metadata", ())
    shape = getattr(told[0], "shape", ()) if len(told) == 1 else ()
    return tuple(size for size in shape if isinstance(size, int))
