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

    def apply_unread(
        self, gradients: Sequence[Tensor], global_norm: Tensor, fires: Tensor | None, scale: Any
    ) -> Tensor:
        """Do the same on a device, where nothing is read, and only where ``fires``; return the norm after over before.

        Args:
            gradients: tensors of any shape, finite or not, that still carry a loss scale of ``scale``.
            global_norm: their L2 norm without it, float64, no dimensions.
            fires: bool, no dimensions; None: on each step.
            scale: a number or a tensor without dimensions.
        """
        raise NotImplementedError

    def factor(self, global_norm: Tensor, fires: Tensor | None) -> Tensor:
        """Return the one factor of a clip that keeps the direction, on the device; 1 where it does not clip."""
        raise NotImplementedError

    def loosened(self, factor: float) -> Self:
        """Return the same clip with its bounds ``factor`` times as wide."""
        raise NotImplementedError
