"""The loss from which a backward starts, by the node of its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gradwatch.records import Behind

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
_MEAN = 1  # as torch counts reductions
_NEAR = 8  # nodes that are followed: a loss may be scaled, averaged or summed with a penalty


class SeenLoss(NamedTuple):
    """What the graph says of a loss.

    Attributes:
        kind: kind of the loss, such as "cross-entropy"; "" if it is not known.
        prediction: shape of the tensor that the loss compares with a target; empty if it is not known.
        behind: what stands between the root of the backward and the loss: nothing, one factor such as a loss scale, a minus sign,
            or more.
        mean: whether it is a mean over the batch.
    """

    kind: str = ""
    prediction: tuple[int, ...] = ()
    behind: Behind = "more"
    mean: bool = False

    @property
    def told(self) -> tuple[str, tuple[int, ...], Behind, bool]:
        """What two batches of one loss have in common: all but the number of rows."""
        return self.kind, self.prediction[1:2], self.behind, self.mean


def seen_loss(roots: Any) -> SeenLoss:
    """Return what is known of the loss from the first nodes behind the roots of a backward."""
    roots = roots if isinstance(roots, (list, tuple)) else [roots]
    ahead = [getattr(root, "grad_fn", None) for root in roots]
    first = ahead[0] if len(ahead) == 1 else None
    for _ in range(_NEAR):
        node = ahead.pop(0) if ahead else None
        if node is None:
            continue
        name = type(node).__name__
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if kind is not None:
            mean = getattr(node, "_saved_reduction", None) == _MEAN
            return SeenLoss(kind, _shape_before(node), _behind(first, node), mean)
        ahead += [following for following, _ in node.next_functions]
    return SeenLoss()


def _behind(root: Any, node: Any) -> Behind:
    """Return what stands between the only root of a backward, or None if there are several, and the node of the loss."""
    if root is node:
        return "nothing"
    if root is None or [following for following, _ in root.next_functions if following is not None] != [node]:
        return "more"
    name = type(root).__name__
    return "a factor" if name.startswith("Mul") else "a minus sign" if name.startswith("Neg") else "more"


def _shape_before(node: Any) -> tuple[int, ...]:
    """Return the shape of the first input of a node, which its gradient will have. No tensor is looked at."""
    before = next((before for before, _ in node.next_functions if before is not None), None)
    told: Any = getattr(before, "_input_metadata", ())
    shape = getattr(told[0], "shape", ()) if len(told) == 1 else ()
    return tuple(size for size in shape if isinstance(size, int))
