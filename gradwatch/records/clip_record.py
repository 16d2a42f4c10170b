"""`ClipRecord`: what auto-clip did about an incident."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.records.kinds import Family  # noqa: TC001  pydantic reads the annotations
from gradwatch.text.wording import counted, number


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What auto-clip did about an incident, and whether it helped.

    Attributes:
        clip: the clip, in words, with the bounds that it had last, before any release by degrees.
        from_step: step at which auto-clip was switched on.
        clipped: number of steps that were clipped.
        skipped: number of steps that were left out.
        steps: number of steps while it was on.
        norm_before: largest global norm meanwhile.
        norm_after: what the clip left of ``norm_before``.
        loss_before: level of the loss before the incident.
        loss_after: last loss while auto-clip is on; level of the loss when the incident closes.
        released_step: step at which auto-clip was switched off; None: it is still on.
        helped: whether everything is as well as before the fault, after it had changed steps; None: not known.
        recovered_after: number of steps after which the loss was back at its level; None: it was not yet.
        measures: measures beyond clipping, in words.
        unlearned: first and last level of the losses of clipped steps, if clipping kept them high while all other losses
            were well. The clip was then released at once.
        family: family of the optimizer.
        damage: what was worse than before the fault when the incident closed, in words.
        mended_step: step at which that damage was over; None: it was not yet.
        scaled_up: number of steps whose gradients the clip made larger.
        narrowed_from: the clip with the bounds at which it was switched on, if they were lowered since; else empty.
        narrowed_step: step at which they were lowered last; None: they were not.
        spared: largest global norm of the clipped steps if it was released because of ``unlearned``; NaN otherwise.
        loosened: whether the largest norm came while the bounds were loosened, to release the clip by degrees.
        lifted_step: step from which on it did not clip, under an optimizer that divides gradients by their own size, because it
            bit on most steps or an explosion had raised a loss that was not learned yet; None: it was not lifted.
        corrected: whether it was left shorter than the bound, because the step would have overshot or a layer stood out.
    """

    clip: str
    from_step: int
    clipped: int = 0
    skipped: int = 0
    steps: int = 0
    norm_before: float = float("nan")
    norm_after: float = float("nan")
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    released_step: int | None = None
    helped: bool | None = None
    recovered_after: int | None = None
    measures: tuple[str, ...] = ()
    unlearned: tuple[float, float] | None = None
    family: Family = "other"
    damage: str = ""
    mended_step: int | None = None
    scaled_up: int = 0
    narrowed_from: str = ""
    narrowed_step: int | None = None
    loosened: bool = False
    spared: float = float("nan")
    corrected: bool = False
    lifted_step: int | None = None

    @property
    def share(self) -> float:
        """The share of clipped steps since ``from_step``; NaN before the first step."""
        return self.clipped / self.steps if self.steps else math.nan

    def __str__(self) -> str:
        clip = self.clip
        if self.narrowed_from:
            clip = f"{self.narrowed_from}, narrowed to {self.clip} by step {self.narrowed_step},"
        parts = [f"{clip} clipped {self.clipped:,} of {counted(self.steps, 'step')}"]
        if self.scaled_up:
            parts[0] += f", {self.scaled_up:,} scaled up"
        if self.skipped:
            parts[0] += f", {self.skipped} skipped"
        if math.isfinite(self.norm_before):
            parts.append(f"largest norm {number(self.norm_before)}{self._of_it}")
        parts += self.measures
        if self.lifted_step is not None:
            used = "used any further" if self.clipped else "used"
            parts.append(
                f"not {used} from step {self.lifted_step} on: this optimizer divides gradients by their average size, so a clip "
                "does not shorten its steps, while a large gradient that it sees does"
            )
        if self.released_step is None:
            return "; ".join(parts if self.lifted_step is not None else [*parts, "still on"])
        if not math.isnan(self.loss_before) and not math.isnan(self.loss_after):
            parts.append(f"loss {number(self.loss_after)}, {number(self.loss_before)} before the fault")
            if self.recovered_after is not None:
                after = self.recovered_after
                parts[-1] += (
                    f", back at its level after {counted(after, 'step')}" if after else ", never above its level"
                )
        outcome = self._outcome
        return "; ".join([*parts, f"released at step {self.released_step}" + (f": {outcome}" if outcome else "")])

    @property
    def _of_it(self) -> str:
        """What became of the largest norm, if it was changed."""
        if self.norm_after == 0 and self.skipped:
            return ", of a step that was left out"
        before, after = number(self.norm_before), number(self.norm_after)
        if before == after or math.isnan(self.norm_after):
            return ""
        done = "clipped" if self.norm_after < self.norm_before else "scaled up"
        why = " while the bound was loosened" if self.loosened else ""
        if self.corrected:
            why += ", shorter than its bound, because the step would have overshot or one layer stood out"
        return f", {done} to {after}{why}"

    @property
    def _outcome(self) -> str:
        if self.helped:
            return "it helped"
        if self.unlearned is not None:
            before, after = self.unlearned
            return (
                f"the losses of the steps that it clipped did not come down, from {number(before)} to {number(after)}, while "
                "the others were well: they carry a rare signal, or these batches are odd. It is not switched on again for "
                f"gradients up to {number(self.spared)}"
            )
        if not self.clipped + self.scaled_up + self.skipped:
            return "it changed no step"
        if not self.damage:
            return ""
        gone = "" if self.mended_step is None else f", which was gone by step {self.mended_step}"
        return f"over, with damage{gone}"
