"""Nodes in the graph of a loss whose backward is not finite, whatever gradient arrives: such as of a square root at zero.

What such nodes keep is kept here too, because a backward frees it; it is looked at only if gradients turn out not to be finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics import ops
from gradwatch.forensics.graph_walk import nodes_below, saved_in
from gradwatch.forensics.marks import Mark
from gradwatch.forensics.operands import operand_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from gradwatch.forensics.names import Names

    Test = Callable[[dict[str, Any]], Tensor]

_MOST = 64  # nodes of a loss
_LARGEST = 4 * 2**20  # bytes of a tensor that is kept


def _zero(name: str) -> Test:
    def is_zero(kept: dict[str, Any]) -> Tensor:
        return kept[name] == 0  # type: ignore[no-any-return]

    return is_zero


def _one(kept: dict[str, Any]) -> Tensor:
    return kept["self"].abs() == 1  # type: ignore[no-any-return]


def _root(kept: dict[str, Any]) -> Tensor:
    exponent = kept["exponent"]
    zero: Tensor = (kept["self"] == 0) & torch.as_tensor((exponent < 1) & (exponent != 0), device=kept["self"].device)
    return zero


def _alike(kept: dict[str, Any]) -> Tensor:
    """Return which eigenvalues are equal to the next one; they are sorted."""
    values: Tensor = kept["eigenvalues"]
    return values[..., 1:] == values[..., :-1]


# by the type of a node: at which elements its backward is not finite
_SINGULAR: dict[str, Test] = {
    "SqrtBackward0": _zero("result"),
    "PowBackward0": _root,
    "PowBackward1": _root,
    "HypotBackward0": _zero("result"),
    "LogBackward0": _zero("self"),
    "Log2Backward0": _zero("self"),
    "Log10Backward0": _zero("self"),
    "Log1PBackward0": lambda kept: kept["self"] == -1,
    "AcosBackward0": _one,
    "AsinBackward0": _one,
    "AtanhBackward0": _one,
    "AcoshBackward0": _one,
    "DivBackward0": _zero("other"),
    "ReciprocalBackward0": lambda kept: torch.isinf(kept["result"]),
    "RsqrtBackward0": lambda kept: torch.isinf(kept["result"]),
    "LinalgEighBackward0": _alike,
    "ExpBackward0": lambda kept: torch.isinf(kept["result"]),
}
_SECOND = frozenset(
    ("LinalgEighBackward0",)
)  # singular only in the derivative of their second output, the eigenvectors
# nodes that pass on whatever is not finite; others, such as of `where` and relu, may put it to zero
_PASSES = frozenset(
    (
        *(
            "add",
            "sub",
            "mul",
            "div",
            "neg",
            "sum",
            "mean",
            "view",
            "unsafe_view",
            "reshape_alias",
            "expand",
            "squeeze",
        ),
        *(
            "unsqueeze",
            "t",
            "transpose",
            "permute",
            "select",
            "slice",
            "abs",
            "sqrt",
            "exp",
            "log",
            "addmm",
            "mm",
        ),
        *("bmm", "stack", "cat", "to_copy", "clone", "tanh", "sigmoid", "softmax", "log_softmax", "index", "alias"),
    )
)


class Singular:
    """The singular nodes of the losses of one step.

    Attributes:
        kept: nodes with what they keep.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Any, frozenset[Any], dict[str, Any]]] = []

    def keep(self, roots: Iterable[Any], ends: frozenset[Any]) -> None:
        """Keep what the nodes above the outputs of the model hold, which are ``ends``, if their backward may be singular."""
        nodes = nodes_below(roots, ends, _MOST)
        for node in nodes:
            if (kind := type(node).__name__) in _SINGULAR:
                if kind in _SECOND and not any((node, 1) in one.next_functions for one in nodes):
                    continue
                saved = saved_in(node)
                if isinstance(exponent := saved.get("exponent"), (int, float)) and exponent >= 1:
                    continue
                if all(one.nbytes <= _LARGEST for one in saved.values() if isinstance(one, torch.Tensor)):
                    self.kept.append((node, ends, saved))

    def forget(self) -> None:
        """Drop everything, because the step is over."""
        self.kept.clear()

    def first(self, names: Names, batch: int) -> Mark | None:
        """Return the first node in the order of the backward that was singular and whose gradient reaches the model."""
        for node, ends, saved in sorted(self.kept, key=lambda one: -one[0]._sequence_nr()):
            try:
                where = _SINGULAR[type(node).__name__](saved)
            except (KeyError, TypeError, AttributeError):  # it keeps less in this case
                continue
            if bool(where.any()) and _passes(node, ends):
                return self._mark(node, saved, where, names, batch)
        return None

    @staticmethod
    def _mark(node: Any, saved: dict[str, Any], where: Tensor, names: Names, batch: int) -> Mark:
        clear = names.has_no_dimension_of(batch) and where.dim() and len(where) == batch
        rows = tuple(torch.nonzero(where.reshape(batch, -1).any(1)).flatten().tolist()) if clear else ()
        op = ops.forward_of(node.name())
        tensors = [(name, one) for name, one in saved.items() if isinstance(one, torch.Tensor)]
        return Mark(
            node._sequence_nr(),
            "operation",
            op,
            op,
            node=node.name(),
            backward=True,
            inputs=tuple(operand_of(name.replace("self", "input"), one) for name, one in tensors),
            rows=rows if len(rows) < batch else (),
            rows_known=bool(clear),
            scalars={"singular": int(where.sum().item())},
        )


def _passes(node: Any, ends: frozenset[Any]) -> bool:
    """Return whether something non-finite that leaves a node is sure to reach the outputs of the model."""
    ahead, seen = [node], {node}
    while ahead:
        here = ahead.pop()
        # of a power, the derivative by the base is singular, and that by the exponent is put to zero there
        for following, _ in here.next_functions[: 1 if here.name() == "PowBackward1" else None]:
            if following in ends:
                return True
            if following is not None and following not in seen and _passes_on(following):
                seen.add(following)
                ahead.append(following)
    return False


def _passes_on(node: Any) -> bool:
    """Return whether what a node returns is not finite if its gradient is not; a power of 0 has a derivative of zero."""
    if ops.forward_of(node.name()) != "pow":
        return ops.forward_of(node.name()) in _PASSES
    exponent = getattr(node, "_saved_exponent", 0) if node.name() == "PowBackward0" else 0
    return isinstance(exponent, (int, float)) and exponent != 0
