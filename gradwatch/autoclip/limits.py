"""The limits by which auto-clip sets its bounds, corrects single steps and lets go."""

from __future__ import annotations

from pydantic import Field

from gradwatch.settings import Settings


class AutoClipLimits(Settings):
    """The limits of auto-clip beyond those that `AutoClip` takes directly.

    Args:
        wide: multiple of the usual norm at which an automatic threshold starts, and to which an outlier layer is scaled.
        narrowest: smallest factor on the first bounds. They are halved each time that clipping has not helped for ``patience``
            steps and the steps were too long.
        apart: multiple of the median surge of all layers above which a layer is an outlier and is scaled by itself.
        shortest: smallest factor on a clipped gradient whose step is predicted to take more from the loss than it holds. Far
            from the minimum such a prediction says little of the step length.
        loosen: factor on the bounds per step during release: at 1.03 they double in 24 steps.
        idle: steps without a bite after which a loosened clip is released.
        level: number of losses whose median is the level of the loss. During release it must not rise by more than three times
            their scatter, or by a tenth of what it has come down since before the incident (if that does not double it).
        long: multiple of ``hold`` after which the clip is loosened although the loss is still high: the task may have changed.
        longer: factor on ``hold`` after loosening has done harm.
        falls: share of its previous level below which a loss has come down.
        bites: share of steps that are clipped from which on the clip determines the step length.
        kept: share of the predicted decrease below which steps are too long.
        compared: number of losses of clipped steps, first and last, and of other steps, by which the effect of the clip is
            judged (see `gradwatch.autoclip.effect`).
        surge: multiple of the typical norm above which the measure ``"skip"`` leaves out a step.
        halvings: number of times that the measure ``"rate"`` halves the learning rate.
    """

    wide: float = Field(default=2.0, gt=0)
    narrowest: float = Field(default=1 / 4, gt=0, le=1)
    apart: float = Field(default=8.0, gt=1)
    shortest: float = Field(default=1 / 4, gt=0, le=1)
    loosen: float = Field(default=1.03, gt=1, le=10)
    idle: int = Field(default=10, ge=1)
    level: int = Field(default=16, ge=1)
    long: float = Field(default=4.0, ge=1)
    longer: float = Field(default=2.0, ge=1)
    falls: float = Field(default=0.9, gt=0, le=1)
    bites: float = Field(default=0.5, ge=0, le=1)
    kept: float = Field(default=1 / 4, ge=0, le=1)
    compared: int = Field(default=8, ge=1)
    surge: float = Field(default=10.0, gt=1)
    halvings: int = Field(default=6, ge=1)
