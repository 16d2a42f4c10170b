"""The policy of auto-clip as frozen settings. `gradwatch.autoclip.engine` applies it to one run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gradwatch.autoclip.limits import AutoClipLimits
from gradwatch.clips import Clip, clip_by_name
from gradwatch.errors import UsageError, did_you_mean
from gradwatch.records import EXPLOSION, Severity
from gradwatch.settings import Settings

Measure = Literal["skip", "rate", "stop"]


class AutoClip(Settings):
    """The policy of auto-clip: which incidents switch on which clip, when it is released, and what follows if it does not help.

    Args:
        clip: a `Clip`, or the name of a clip (``"norm"``, ``"value"``, ...), which is used with its defaults.
        when: incident kinds that switch the clip on, or ``"always"`` for ordinary clipping with telemetry. ``"spike"`` also acts
            on single odd batches, which the default leaves alone: what looks like one may be a rare signal. On a device such a
            step is over before it is judged.
        severity: lowest severity that switches the clip on. Default: ``"warning"``, or ``"notice"`` if you pass a ``when``
            that contains ``"spike"``.
        threshold: how the bounds of the clip are chosen. A number between 0.5 and 10 is a multiple of the run's own typical
            global norm before the incident; in this range clipping still converges (Pascanu et al. 2013). If larger norms
            recur, such as those of a rare class, the typical norm is half of the size that they usually reach (see
            `gradwatch.history.recurrence`). ``"auto"`` starts at 2 and goes down to 0.5 while steps are too long. A run with
            fewer than 16 norms starts with the clip's own bounds, a norm of 1.0 by default, and goes down to a quarter of
            them. With ``"auto"``, outlier layers are scaled first. With SGD, each group of layers that
            share a learning rate is also scaled so that its predicted decrease does not exceed the loss, and never below a
            quarter of the clipped gradient (see `gradwatch.autoclip.guard`). Adam and similar optimizers are left explosions
            that have raised the loss of a run that has not learned yet, and those that go on: a clip does not shorten their
            steps, and large gradients do. None: the clip's own
            bounds. The default is ``"auto"`` for a clip that is given by name and takes a threshold, unless
            ``when="always"``; otherwise None.
        hold: number of optimizer steps without a firing alarm after which the clip may be released and the incident closed.
        escalate: measures to take, in this order, each time that clipping has not helped for ``patience`` steps: ``"skip"``
            leaves out steps that surge, ``"rate"`` halves the learning rate (up to six times), ``"stop"`` raises a
            `TrainingUnstableError`. Under Adam, ``"skip"`` is left out if ``"rate"`` is among them. By default there are none:
            auto-clip clips, and reports if it does not help.
        patience: number of optimizer steps for which the clip, and each of these measures, is given the chance to help.
        on_nonfinite: what to do with a step whose gradients hold NaN or Inf: ``"skip"`` leaves it out (parameters, optimizer
            state and the buffers of the model stay as they were), ``"stop"`` raises a `TrainingUnstableError`, ``"ignore"``
            applies it unchanged.
        max_skips: number of steps of one optimizer in a row that are skipped. One more that is not finite raises a
            `TrainingUnstableError`; one that surges is made.
        limits: further limits, such as how the clip is released (see `AutoClipLimits`).

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
    limits: AutoClipLimits = AutoClipLimits()

    def __init__(self, clip: Clip | str, **settings: Any) -> None:
        when = settings.get("when")
        if isinstance(when, (str, tuple, list)) and "spike" in when:  # the severity of a spike is never above notice
            settings.setdefault("severity", "notice")
        if isinstance(clip, str):
            clip = clip_by_name(clip)
            if clip.takes_threshold and when != "always":
                settings.setdefault("threshold", "auto")
        super().__init__(clip=clip, **settings)
        if self.threshold is not None and not self.clip.takes_threshold:
            raise UsageError(
                f"{self.clip} has no bound that a threshold could set. Leave out threshold={self.threshold!r}."
            )
        if self.threshold is not None and self.when == "always":
            raise UsageError(
                f'threshold={self.threshold!r} is applied when an incident opens, but with when="always" auto-clip does not '
                "wait for one. Leave out the threshold."
            )

    @property
    def treats_spikes(self) -> bool:
        """True if the policy acts on a loss that jumped because of its batch, which is only a notice."""
        return self.when != "always" and "spike" in self.when and self.severity == "notice"

    @property
    def skips(self) -> bool:
        """True if the policy may leave out a step."""
        return self.on_nonfinite == "skip" or "skip" in self.escalate

    @field_validator("when", mode="before")
    @classmethod
    def _known_kinds(cls, when: Any) -> Any:
        kinds = (when,) if isinstance(when, str) and when != "always" else when
        if not isinstance(kinds, (str, tuple, list)):
            raise ValueError("expected incident kinds, or 'always'")  # noqa: TRY004  pydantic turns it into a UsageError
        for kind in () if kinds == "always" else kinds:
            if kind not in EXPLOSION:
                known = (*EXPLOSION, "always")
                raise ValueError(f"there is no explosive incident kind {kind!r}.{did_you_mean(str(kind), known)}")
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
