"""GW402: units or whole layers are dead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.gradient_norms import ABSENT
from gradwatch.history.optimizer_rows import rows_by_optimizer
from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.history.history import History
    from gradwatch.history.optimizer_rows import OptimizerRows
    from gradwatch.records import Alarm, Floats, Kind, Sign


_LEVEL = 32  # newest losses whose median is the level of a loss
_FLOOR = 0.01  # share of what a loss was first, or with the largest gradients, below which it is at its floor
_MOSTLY = 0.9  # share of rows without any gradient of one side of two that oppose each other, from which on it is dead
_CHANCE = 1e-6  # of an absence as long as this one, in a layer that had a gradient as often as this one


class Dead(Rule):
    """Units or whole layers are dead: their gradient is exactly zero, or no longer arrives.

    ## What it means
    A unit is a row of a weight matrix (an output of a linear layer, a channel of a convolution). It is dead if its
    gradient was exactly zero at each of four samples, each from a different batch, in which the layer had a gradient.

    ## Formula
    `value = dead units / units` of the layer, over the four samples, minus `1 / sqrt(units)` except in the first layer: at
    initialisation a deep unit is on or off for all inputs alike, so two standard deviations of that chance share are
    subtracted (the value reported is the difference). `value = 1` where the gradient norm of the whole layer is exactly zero
    at this step and was not above zero in any of the 48 rows before: a head that is used now and then is only idle. If it
    was, `value` is at least half the share of zeros among these 49 rows, up to the limit. `value = 1` also where no gradient
    of the layer arrived in these 49 rows although it did before, the layer is trainable and the optimizer that made the step
    holds it. Where several optimizers step by turns, only the rows of its own count. It is not so if the layer was absent for
    half as long before, nor if an absence as long as this one may be chance: `n` steps after `k` steps with a gradient among
    `t`, where `(t / (t + n))^k > 1e-6`.

    It fires where `value > limit` (0.5) for `for_steps` (16) steps, and resolves once `value` was at most `release * limit`
    (0.25) for more than `keep_steps` (16) steps: a layer that wakes up for one step stays dead. Only the weights of linear
    and convolutional layers have units; words of an embedding that do not occur are not dead. Samples in which the layer had
    no gradient at all, such as one without a reward, say nothing of its units and do not count. Where the gradient of all
    that an optimizer holds is zero, its loss may be at its floor: nothing counts as dead unless the loss (the median of the
    last 32) is not zero and higher than it was before, or the only optimizer never had a gradient in at least 49 rows. Where
    the losses of two optimizers oppose each other, the other one moves the loss too: at its floor it is not negative, and at
    most a hundredth of what it was when the gradients were largest. One side whose gradients are all zero in nine of ten of these
    49 rows is dead, with that share as `value`, also while it wakes up. A layer that you have frozen is not dead, nor one without
    elements, nor a bias whose own weights have a gradient: its gradient cancels, as in the last layer of a critic.

    While the loss is at most half of the first and of the reference loss, and some gradient arrives, the incident is only a
    notice, unless the loss does not tell (a GAN, a reward); it becomes a warning once the loss has been high again for 100
    steps. What the loss lost at the very step at which a whole layer fell silent does not count as fallen: it may have been the
    loss of that part.

    ## Why it is bad
    A dead unit never learns again: no gradient reaches it, so nothing can bring it back.

    ## What to do
    Lower the learning rate (ReLU units usually die from a single large step). Use LeakyReLU or GELU. Initialise biases at
    zero or slightly above. Scale the inputs. If a whole layer is dead, look for a `detach()`, an `argmax`, or an output that
    the loss does not use.

    ## When it is harmless
    Experts that the router did not choose; a branch that is used later in training.

    ## Source
    Lu et al., "Dying ReLU and initialization" (2019), arXiv:1903.06733.
    """

    code: ClassVar[str] = "GW402"
    name: ClassVar[str] = "dead units"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "dead"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a layer with zero gradient", fires=15, grad={"a": "0x40", "b": "1x40"}),
        Case("a loss at its floor", fires=None, grad="0x40"),
        Case("as low as ever", fires=None, grad="1x50 0x100", loss="1x50 0.9x100"),
        Case("moved by an opponent", fires=109, grad="1x50 0x100", loss="1x50 0.9x100", opposed=True),
        Case("won against an opponent", fires=None, grad="1x50 0x100", loss="1x50 1e-3x100", opposed=True),
        Case("three of four units", fires=15, dead="0.75x40"),
        Case("one unit in five", fires=None, dead="0.2x40"),
        Case("zero now and then", fires=None, grad="0 1 0 1 0 1 0 1"),
    )

    limit: float = Field(default=0.5, gt=0, lt=1)
    release: float = Field(default=0.5, gt=0, le=1)
    for_steps: int = Field(default=16, ge=1)
    keep_steps: int = Field(default=16, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the share of dead units of each layer beyond chance, shape (L,); 1 where a whole layer is dead."""
        mine, *others = rows_by_optimizer(history, 2 * ABSENT)
        value = self._measured(history, mine)
        for part in others:
            value[part.held] = self._measured(history, part)[part.held]
        return value

    def _measured(self, history: History, part: OptimizerRows) -> Floats:
        """Return the value of each layer by the rows of its optimizer, shape (L,)."""
        norms = part.last(ABSENT)
        units = self._units_beyond_chance(history)
        if norms.min(initial=np.inf) > 0:  # false for NaN: each layer had a gradient in each row
            return units
        now = norms[-1]
        if _never_reached(history, part, norms):
            return np.where(part.held & history.matrices, 1.0, 0.0)
        silent = (now == 0).any() and not (now > 0).any() and not history.nonfinite.any()
        if silent and _is_at_floor(history, part):
            return np.zeros(len(history.layers))
        share = _silent_beside_opponent(history, part, norms)
        frozen = (now == 0) & ~part.held & part.held.any()
        units = np.where(frozen, 0.0, units)
        units[_stopped(history, part, norms)] = 1.0
        units = np.where(part.held & history.matrices & (share > units), share, units)
        if not (norms == 0).any():
            return units
        zero = np.where(history.sizes > 0, np.mean(norms == 0, axis=0), 0.0)  # a layer without elements cannot die
        zero[frozen] = 0.0
        dead = (now == 0) & ~(norms > 0).any(axis=0) & (zero > 0)
        cancels = dead & (history.weight_of >= 0) & (now[history.weight_of] > 0)
        zero[cancels] = dead[cancels] = 0
        asleep: Floats = np.where(dead, 1.0, np.minimum(zero / 2, self.limit))
        return np.where(zero > 0, np.fmax(units, asleep), units)

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        mine, *others = rows_by_optimizer(history, 2 * ABSENT)
        part = next((one for one in others if one.held[column]), mine)
        norms = part.last(ABSENT)
        never = _never_reached(history, part, norms)
        absent = never or column in _stopped(history, part, norms)
        layer = absent or part.last(1)[0, column] == 0
        gaps = _gaps(part, column)
        since = int(part.steps[-max(1, gaps[-1])])
        return {
            "layer": layer,
            "absent": absent,
            "never": never,
            "since": since,
            "exactly": len(gaps) > 1,
            "left": history.loss_left(since) if layer else 1.0,
            "share": history.dead_share[column],
            "units": max(1.0, history.sizes[column] / history.fan_in[column]),
            "by chance": self._by_chance(history)[column],
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        numbers = alarm.numbers
        if numbers.get("never"):
            return f"by step {alarm.step} no gradient had reached {alarm.layer}, nor any other layer that the optimizer holds"
        if numbers["absent"]:
            return (
                f"at step {alarm.step}, no gradient had reached {alarm.layer} at any measured step since {began(numbers)}, "
                "although the optimizer holds it and gradients reached it before"
            )
        if numbers["layer"]:
            return (
                f"the gradient of {alarm.layer} was exactly zero at step {alarm.step}, and above zero at no measured step since "
                f"step {numbers['since']:.0f}"
            )
        share, limit = apart(100 * numbers["share"], 100 * (alarm.limit + numbers["by chance"]))
        return (
            f"{share} % of the {counted(numbers['units'], 'unit')} of {alarm.layer} were dead at step {alarm.step}: a gradient "
            f"of exactly zero in each of four samples (limit {limit} %)"
        )

    def _units_beyond_chance(self, history: History) -> Floats:
        share = history.dead_share
        return share - self._by_chance(history) if (share > 0).any() else share.copy()

    @staticmethod
    def _by_chance(history: History) -> Floats:
        """Return two standard deviations of the share of units that chance alone makes dead, shape (L,); 0 in the first layer."""
        units = np.maximum(history.sizes / history.fan_in, 1)
        known = np.isfinite(history.dead_share)
        first = known & (history.order == np.max(history.order, where=known, initial=-1))
        return np.where(first, 0.0, 1 / np.sqrt(units))


def _is_at_floor(history: History, part: OptimizerRows) -> bool:
    """Return whether the loss is zero or as low as ever, where all of an optimizer's gradients are; True if it is not known."""
    alive = np.flatnonzero((part.last()[:, part.held] > 0).any(axis=1))
    losses = part.losses
    since = int(alive[-1]) + 1 if alive.size else 0
    now, _ = median_and_mad(losses[since:][-_LEVEL:])
    before = losses[:since][np.isfinite(losses[:since])]
    if history.opposed and (history.typical_grad.seen[part.held] > 0).any():
        _, then = history.largest_typical
        return bool(0 <= now <= _FLOOR * median_and_mad(then[part.held])[0])
    if before.size:
        return now == 0 or not now > before.min()
    if not (history.typical_grad.seen[part.held] > 0).any():  # no gradient ever
        waits = part.places is not None  # one of several optimizers may wait for its turn
        return waits or now == 0 or not np.count_nonzero(np.isfinite(losses)) >= ABSENT
    return not now > _FLOOR * abs(history.reference_loss)  # it is silent for longer than rows are kept


def _silent_beside_opponent(history: History, part: OptimizerRows, norms: Floats) -> float:
    """Return the share of rows without any gradient of an optimizer whose loss an opponent moves; 0.0 if it is not at least 0.9.

    ``norms``, (n, L): the last norms of the optimizer. Without an opponent, a reward may be rare.
    """
    if not history.opposed or len(norms) < ABSENT or not part.held.any():
        return 0.0
    mine = norms[:, part.held]
    share = float(np.mean((mine == 0).any(axis=1) & ~(mine > 0).any(axis=1)))
    return share if share >= _MOSTLY and not _is_at_floor(history, part) else 0.0


def _never_reached(history: History, part: OptimizerRows, norms: Floats) -> bool:
    """Return whether no gradient has ever reached what the only optimizer holds; ``norms``, (n, L): its last norms."""
    if len(norms) < ABSENT or part.places is not None or not part.held.any():
        return False
    came = (history.typical_grad.seen > 0) | ~np.isnan(norms).all(axis=0) | (history.nonfinite > 0)
    if history.row.arrived is not None:
        came |= history.row.arrived
    return not came[part.held].any()


def _stopped(history: History, part: OptimizerRows, norms: Floats) -> list[int]:
    """Return the columns of layers whose gradient no longer arrives; ``norms``, (n, L): the last norms of their optimizer."""
    if len(norms) < ABSENT:
        return []
    absent = part.held & np.isnan(norms).all(axis=0) & (history.nonfinite == 0)
    return [column for column in np.flatnonzero(absent).tolist() if _has_stopped(history, part, column)]


def _has_stopped(history: History, part: OptimizerRows, column: int) -> bool:
    """Return whether a layer's gradient has been absent for longer than its earlier absences and chance explain."""
    *before, gap = _gaps(part, column)
    before.append(int(history.longest_absence[column]))  # rows are kept for a while only
    seen = int(history.typical_grad.seen[column])
    steps = max(1, seen, history.task_rows * part.share - gap)
    return gap > 2 * max(before) and seen * math.log1p(gap / steps) > -math.log(_CHANCE)


def _gaps(part: OptimizerRows, column: int) -> list[int]:
    """Return the numbers of rows without a gradient above zero: before each row with one, and after the last that is kept."""
    norms = part.last()[:, column]
    came = np.flatnonzero(norms > 0)
    gaps: list[int] = (np.diff(came, prepend=-1, append=len(norms)) - 1).tolist()
    return gaps


def began(numbers: Mapping[str, float]) -> str:
    """Return since when a layer has had no gradient: only steps that are still kept are known."""
    return f"step {numbers['since']:.0f}" + ("" if numbers.get("exactly", True) else " or before")
