"""What a clip is: frozen bounds and one function that changes gradients in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from gradwatch.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from typing_extensions import Self


class Clip(Settings):
    """A way to make gradients smaller.

    Class variable ``keeps_direction``: it multiplies all gradients by one factor.
    """

    keeps_direction: ClassVar[bool] = False

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def apply(self, gradients: Sequence[Tensor], global_norm: float) -> float:
        """Change ``gradients`` in place; return the global norm after over the one before, at most 1.

        Args:
            gradients: finite tensors of any shape.
            global_norm: their L2 norm as one vector, already measured.
        """
        raise NotImplementedError

    def loosened(self, factor: float) -> Self:
        """Return the same clip with its bounds ``factor`` times as wide."""
        raise NotImplementedError
