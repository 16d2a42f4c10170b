"""The kind of loss from which a backward starts, by the node of its graph."""

from __future__ import annotations

from typing import Any

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


def loss_kind(roots: Any) -> str:
    """Return the kind of the loss among the first nodes behind the roots of a backward, such as "cross-entropy"; else ""."""
    roots = roots if isinstance(roots, (list, tuple)) else [roots]
    ahead = [getattr(root, "grad_fn", None) for root in roots]
    for _ in range(_NEAR):
        node = ahead.pop(0) if ahead else None
        if node is None:
            continue
        name = type(node).__name__
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if kind is not None:
            return kind
        ahead += [following for following, _ in node.next_functions]
    return ""
