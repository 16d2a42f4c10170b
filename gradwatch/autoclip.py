"""When to clip, when to let go, when to stop.

`AutoClip` is the policy, frozen; `Clipping` follows one run. Auto-clip never guesses for itself: it acts on the
incident that the rules opened, in the very step in which it opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from gradwatch.clips import Clip, clip_by_name
from gradwatch.errors import TrainingUnstableError, did_you_mean
from gradwatch.incidents import EXPLOSION
from gradwatch.records import SEVERITIES, ClipRecord, Severity
from gradwatch.settings import Settings

if TYPE_CHECKING:
    from gradwatch.history import History
    from gradwatch.incidents import Incidents
    from gradwatch.records import Row


class AutoClip(Settings):
    """The policy: which incidents switch which clip on, and when it lets go.

    Args:
        clip: a `Clip`, or ``"norm"`` or ``"value"`` for one with its defaults.
        when: the incident kinds that switch it on, or ``"always"`` for ordinary clipping with telemetry.
        severity: the least severity that switches it on: ``"warning"``, or ``"notice"`` where ``when`` names spikes.
        hold: optimizer steps without a firing alarm after which it lets go and the incident closes.
        on_nonfinite: what to do with a step whose gradients hold NaN or Inf: ``"skip"`` it (parameters and optimizer
            state stay untouched), ``"stop"`` with a `TrainingUnstableError`, or ``"ignore"``.
        max_skips: steps skipped in a row before `TrainingUnstableError`.

    Raises:
        UsageError: a setting is unknown or out of its range.
    """

    clip: Clip
    when: tuple[str, ...] | Literal["always"] = EXPLOSION
    severity: Severity = "warning"
    hold: int = Field(default=30, ge=1)
    on_nonfinite: Literal["skip", "stop", "ignore"] = "skip"
    max_skips: int = Field(default=20, ge=1)

    def __init__(self, clip: Clip | str, **settings: Any) -> None:
        when = settings.get("when")
        if (
            isinstance(when, (str, tuple, list)) and "spike" in when
        ):  # asked for by name: a spike is never worse than a notice
            settings.setdefault("severity", "notice")
        super().__init__(clip=clip_by_name(clip) if isinstance(clip, str) else clip, **settings)

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


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with this step's gradients before the optimizer sees them."""

    clip: Clip | None = None
    skip: bool = False


NOTHING = Decision()


@dataclass(frozen=True, slots=True)
class Orders:
    """What to do with a step before any rule has seen it: for gradients on a device, whose rows arrive steps later.

    ``clip``: on each step, for auto-clip is on. ``reserve``: where the step surges: the global norm above ``far`` times
    the typical one, or above ``surge`` times beside a loss above ``loss_ceiling``. ``skip``: a step that is not finite.
    """

    clip: Clip | None = None
    reserve: Clip | None = None
    skip: bool = False
    surge: float = math.inf
    far: float = math.inf
    loss_ceiling: float = math.inf


_LOOSEN = 1.03  # by step, while letting go: twice the bounds after 24 steps
_LEVEL = 16  # losses whose median must not rise meanwhile
_IDLE = 10  # steps without a bite after which a loosened clip is let go


class Clipping:
    """Auto-clip's state in one run: whether it is on, how tight, what it has done.

    On, it clips with the policy's own bounds until the run has been calm for ``hold`` steps. If the clip no longer bites
    then, it lets go; if it does, it lets go by degrees, loosening the bounds step by step until it bites no more. When
    the loss gets worse meanwhile, it goes back to its bounds and holds twice as long.
    """

    def __init__(self, policy: AutoClip, history: History) -> None:
        self.policy = policy
        self.history = history
        self.clipped = 0
        self.skipped = 0
        self.record: ClipRecord | None = None
        self._baseline = policy.clip.baseline()
        self._looked = 0
        self._skips_in_a_row = 0
        self._hold = policy.hold
        self._held_since = 0
        self._looseness = 1.0
        self._loss_ceiling = math.inf
        self._well_below = math.inf
        self._idle = 0

    @property
    def on(self) -> bool:
        """True while it clips."""
        return self.record is not None or self.policy.when == "always"

    def clip(self, rows: int) -> Clip | None:
        """Return the clip with the bounds of this moment, from the run's first ``rows`` rows; None: nothing to go by yet."""
        clip = self.policy.clip if self._baseline is None else self._baseline.clip(self.history, rows)
        return clip if self._looseness == 1.0 or clip is None else clip.loosened(self._looseness)

    def orders(self, surge: float, far: float) -> Orders:
        """Say what to do with the coming step, in advance; ``surge`` and ``far`` are the rules' limits."""
        explosive = self.policy.when != "always" and "exploding" in self.policy.when
        clip = self.clip(self.history.rows) if self.on or explosive else None
        return Orders(
            clip=clip if self.on else None,
            reserve=clip if not self.on else None,
            skip=self.policy.on_nonfinite != "ignore",
            surge=surge,
            far=far,
            loss_ceiling=self.history.next_loss_ceiling(),
        )

    def decide(self, row: Row, incidents: Incidents) -> Decision:
        """Say what to do with the gradients of ``row``, before the optimizer sees them.

        Raises:
            TrainingUnstableError: too many steps in a row had to be skipped.
        """
        incident = incidents.open_explosion()
        if self.record is None and incident is not None and self._switches_on(incident.kind, incident.severity):
            before, scatter = self.history.loss_level()
            before = before if math.isfinite(before) else row.loss
            usual = (
                scatter if self.history.losses >= _LEVEL else 0.0
            )  # a few losses of an explosion have no usual scatter
            self._well_below = before + max(usual, abs(before) / 20)
            self.record = ClipRecord(str(self.policy.clip), row.step, loss_before=before)
            self._hold, self._held_since, self._idle = self.policy.hold, row.step, 0
            self._looseness, self._loss_ceiling = 1.0, math.inf
        if row.poisoned:
            return self._skip(row) if self.policy.on_nonfinite != "ignore" else NOTHING
        self._skips_in_a_row = 0
        # an average of norms must not miss what the ring forgets
        clip = self.clip(self.history.rows - 1) if self.on or self._falls_behind() else None
        return Decision(clip=clip) if self.on and clip is not None else NOTHING

    def _falls_behind(self) -> bool:
        behind = self._baseline is not None and self.history.rows - self._looked >= self.history.window // 2
        if behind:
            self._looked = self.history.rows
        return behind

    def done(self, row: Row, decision: Decision, coefficient: float, incidents: Incidents) -> None:
        """Take note of what was done to ``row``'s gradients; ``coefficient`` is norm after over norm before."""
        clipped = decision.clip is not None and coefficient < 1.0
        self.clipped += clipped
        self.skipped += decision.skip
        self._idle = 0 if clipped or decision.skip else self._idle + 1
        if self.record is None:
            return
        norm = row.global_norm
        record = replace(
            self.record,
            steps=self.record.steps + 1,
            clipped=self.record.clipped + clipped,
            skipped=self.record.skipped + decision.skip,
            loss_after=row.loss,
        )
        if math.isfinite(norm) and not norm <= record.norm_before:
            record = replace(record, norm_before=norm, norm_after=norm * coefficient)
        self.record = record
        incidents.record_clip(record)

    def may_let_go(self, step: int, calm: int) -> bool:
        """True when the run, calm for ``calm`` steps, needs the clip no more; loosens it when it still bites."""
        if self.record is None:
            return calm >= self.policy.hold
        if min(calm, step - self._held_since) < self._hold:
            if self._looseness > 1.0:
                self._tighten(step)
            return False
        if self._idle >= (self._hold if self._looseness == 1.0 else _IDLE):
            return True
        level, scatter = self.history.loss_level(_LEVEL)
        if level > self._loss_ceiling:
            self._tighten(step)
            return False
        if math.isfinite(level):
            self._loss_ceiling = min(self._loss_ceiling, level + max(abs(level), 3 * scatter))
        self._looseness *= _LOOSEN
        return False

    def _tighten(self, step: int) -> None:
        """Go back to the policy's bounds, for twice as long: letting go did harm."""
        self._looseness, self._loss_ceiling = 1.0, math.inf
        self._hold, self._held_since = 2 * self._hold, step

    def let_go(self, step: int) -> ClipRecord | None:
        """Switch off because the incident closes; return the finished record."""
        if self.record is None:
            return None
        after, _ = self.history.loss_level(_LEVEL)
        # where no loss was seen nothing speaks against it: the run became calm
        helped = not math.isfinite(self.record.loss_before) or after <= self._well_below
        record = replace(self.record, released_step=step, helped=helped, loss_after=after)
        self.record, self._looseness = None, 1.0
        return record

    def _switches_on(self, kind: str, severity: Severity) -> bool:
        enough = SEVERITIES.index(severity) >= SEVERITIES.index(self.policy.severity)
        return enough and self.policy.when != "always" and kind in self.policy.when

    def _skip(self, row: Row) -> Decision:
        self._skips_in_a_row += 1
        weights = bool(self.history.nonfinite_weight.any())
        if self.policy.on_nonfinite == "stop" or self._skips_in_a_row > self.policy.max_skips:
            self.record = None
            where = self.history.first_nonfinite() or "an unknown layer"
            what = f"Gradients are not finite at step {row.step} (first in backward order: {where})"
            if self.policy.on_nonfinite == "stop":
                raise TrainingUnstableError(f'{what}, and on_nonfinite="stop". They were not applied.')
            cause = (
                "the weights themselves are not finite, so no later step can be better; go back to a checkpoint"
                if weights
                else "no batch since then gave finite gradients; look at the loss and the data of this step"
            )
            raise TrainingUnstableError(
                f"{what}, after {self._skips_in_a_row - 1} steps skipped in a row of at most {self.policy.max_skips}: "
                f"{cause}. No gradient that is not finite was applied since step {row.step - self._skips_in_a_row + 1}."
            )
        return Decision(skip=True)
