"""What a program makes of its loss before it calls backward: it divides by the number of batches, or multiplies by a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.forensics.same_graph import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gradwatch.forensics.same_graph import Place

_MOST = 8  # operations
_MULTIPLES = frozenset(("MulBackward0", "DivBackward0", "ToCopyBackward0", "AliasBackward0"))


class Multiple(NamedTuple):
    """A tensor of which a root is a multiple.

    Attributes:
        place: the node of autograd that has made it, and which of its outputs it is.
        steps: name and factor of the operations that lead from it to the root; a factor that is not known is None.
    """

    place: Place
    steps: tuple[tuple[str, Any], ...]

    def root_of(self, loss: Tensor) -> float | None:
        """Return the value of the root, given that of the tensor; None if a factor is not known."""
        value = loss.detach()
        for name, factor in self.steps:
            if name == "AliasBackward0":
                continue
            if factor is None:
                return None
            value = (value / factor if name == "DivBackward0" else value * factor).to(value.dtype)
        return float(value)


def multiples_of(root: Tensor) -> Iterator[Multiple]:
    """Yield the root itself and each tensor of which it is a multiple, by numbers or by tensors that need no gradient."""
    place = place_of(root)
    steps: tuple[tuple[str, Any], ...] = ()
    for _ in range(_MOST):
        node = place[0]
        if node is None:
            return
        yield Multiple(place, steps)
        ahead = [(number, one) for number, one in enumerate(node.next_functions) if one[0] is not None]
        name = node.name()
        if name not in _MULTIPLES or len(ahead) != 1 or (name == "DivBackward0" and ahead[0][0]):
            return
        number, place = ahead[0]
        steps = ((name, _factor(node, number)), *steps)


def _factor(node: Any, number: int) -> Any:
    """Return the factor of a product or the divisor of a quotient, whose other part is at place ``number``."""
    try:
        return node._saved_self if number else node._saved_other
    except (AttributeError, RuntimeError):  # it keeps none, or has been freed by its backward
        return None
