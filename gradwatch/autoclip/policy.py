"""When to clip, when to let go, when to go further: the policy, frozen. `gradwatch.autoclip.engine` follows one run by it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gradwatch.clips import Clip, clip_by_name
from gradwatch.errors import UsageError, did_you_mean
from gradwatch.records import (
    EXPLOSION,
    Severity,
)
from gradwatch.settings import Settings

Measure = Literal["skip", "rate", "stop"]


class AutoClip(Settings):
    """The policy: which incidents switch which clip on, when it lets go, and what is done where clipping is not enough.

    Args:
        clip: a `Clip`, or the name of one (``"norm"``, ``"value"``, ...) with its defaults.
        when: the incident kinds that switch it on, or ``"always"`` for ordinary clipping with telemetry.
        severity: the least severity that switches it on: ``"warning"``, or ``"notice"`` where ``when`` names spikes.
        threshold: where the clip's bounds come from. A number between 0.5 and 10 is that many times the run's own typical
            global norm before the incident: the band in which clipping still converges (Pascanu et al. 2013). Where larger
            norms come again and again, as those of a rare class do, typical is half of what they reach
            (`gradwatch.history.recurrence`). ``"auto"`` begins at 2 and goes down to 0.5 where steps are too long. A run that
            has no 16 norms yet starts with the clip's own bounds, a norm of 1.0 by default, and goes down to a quarter. With
            ``"auto"`` and gradients on the CPU, a layer that stands out alone comes first, and steps of SGD are held to what the
            loss holds (`gradwatch.autoclip.guard`). None: always the clip's own. Given by name, a clip that takes a threshold is
            ``"auto"``.
        hold: optimizer steps without a firing alarm after which it lets go and the incident closes.
        escalate: what to do next, in this order, each time clipping has not helped for ``patience`` steps: ``"skip"``
            steps that surge, lower the learning ``"rate"`` by half (as often as six times), ``"stop"`` with a
            `TrainingUnstableError`. Nothing by default: it clips, and says that it does not help.
        patience: optimizer steps that each of these measures, and the clip before them, is given to help.
        on_nonfinite: what to do with a step whose gradients hold NaN or Inf: ``"skip"`` it (parameters, optimizer
            state and the model's buffers stay as they were), ``"stop"`` with a `TrainingUnstableError`, or ``"ignore"``.
        max_skips: such steps of one optimizer in a row before `TrainingUnstableError`.

    Raises:
        UsageError: a setting is unknown or out of its range.
    """

    clip: Clip
    when: tuple[str, ...] | Literal["always"] = EXPLOSION
    severity: Severity = "warning"
    threshold: float | Literal["auto"] | None = None
    hold: int = Field(default=30, ge=1)
    escalate: tuple[Measure, ...] = ()
    patience: int = Field(default=30, ge=1)
    on_nonfinite: Literal["skip", "stop", "ignore"] = "skip"
    max_skips: int = Field(default=20, ge=1)

    def __init__(self, clip: Clip | str, **settings: Any) -> None:
        when = settings.get("when")
        if (
            isinstance(when, (str, tuple, list)) and "spike" in when
        ):  # asked for by name: a spike is never worse than a notice
            settings.setdefault("severity", "notice")
        if isinstance(clip, str):
            clip = clip_by_name(clip)
            if clip.takes_threshold and when != "always":
                settings.setdefault("threshold", "auto")
        super().__init__(clip=clip, **settings)
        if self.threshold is not None and not self.clip.takes_threshold:
            raise UsageError(
                f"{self.clip} has no bound that a threshold could set: leave out threshold={self.threshold!r}."
            )
        if self.threshold is not None and self.when == "always":
            raise UsageError(
                f'threshold={self.threshold!r} is taken when an incident opens; with when="always" none does.'
            )

    @property
    def skips(self) -> bool:
        """True when it may leave out a step."""
        return self.on_nonfinite == "skip" or "skip" in self.escalate

    @field_validator("when", mode="before")
    @classmethod
    def _known_kinds(cls, when: Any) -> Any:
        kinds = (when,) if isinstance(when, str) and when != "always" else when
        if not isinstance(kinds, (str, tuple, list)):
            raise ValueError("expected incident kinds, or 'always'")  # noqa: TRY004  pydantic turns it into a UsageError
        for kind in () if kinds == "always" else kinds:
            if kind not in EXPLOSION:
                raise ValueError(f"there is no explosive incident kind {kind!r}.{did_you_mean(str(kind), EXPLOSION)}")
        return kinds

    @field_validator("threshold")
    @classmethod
    def _in_the_safe_band(cls, threshold: Any) -> Any:
        if isinstance(threshold, float) and not 0.5 <= threshold <= 10:
            raise ValueError("expected 0.5 to 10 times the run's own typical norm, 'auto' or None")
        return threshold

    @field_validator("escalate", mode="before")
    @classmethod
    def _in_order(cls, measures: Any) -> Any:
        measures = (measures,) if isinstance(measures, str) else tuple(measures)
        if len(set(measures)) < len(measures) or ("stop" in measures and measures[-1] != "stop"):
            raise ValueError("expected each measure once, and 'stop' as the last")
        return measures
