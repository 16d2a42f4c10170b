"""The other processes of a distributed training, as one recorder meets them: at the first step, then once in each row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch import device
from gradwatch.distributed.agreement import PACE, differences, settings_of, told
from gradwatch.distributed.group import Agreed, Local, Ranks, Unsupported, Word, find_ranks
from gradwatch.measure.checkpoints import buffers_are_bad
from gradwatch.measure.packed_row import BUFFER_BAD, FLAGS
from gradwatch.measure.readback import LAG

if TYPE_CHECKING:
    from gradwatch.autoclip.decision import Decision
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.packed_row import UnpackedRow
    from gradwatch.measure.sampling import Sample
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.judge import Judge
    from gradwatch.records import Culprits, LossSource, Row


class Peers:
    """The processes that train the watched model together, this one among them.

    Args:
        layers: the watched parameters.
        judge: told of what all processes agree on.
        gradient_hooks: asked whether this process's own backward was finite.
        pace: how often to measure, and by which version of gradwatch, to be compared between processes.

    Attributes: ``ranks`` is None while this process is alone or has not met the others; ``met`` tells the two apart.
    ``every`` and ``closely`` are what all processes agreed on with the last row. ``left_out`` counts the steps in a row that
    the gradient scalers of all of them left out. ``leaving`` is True when all switch off at the next step.
    ``buffers_are_well``: in all of them, when they were last looked at.
    """

    def __init__(self, layers: Layers, judge: Judge, gradient_hooks: GradientHooks, pace: dict[str, Any]) -> None:
        self._layers = layers
        self._judge = judge
        self._hooks = gradient_hooks
        self._pace = pace
        self.ranks: Ranks | None = None
        self.met = False
        self.every = 0
        self.closely = False
        self.left_out = 0
        self.leaving = False
        self.buffers_are_well = True
        self._alike = True  # the settings of all processes
        self._row_is_due = False
        self._clipped_by_value: tuple[Row, Decision, float] | None = None
        self._after = 0.0

    @property
    def count(self) -> int:
        """The number of processes whose rows become one."""
        return self.ranks.size if self.ranks is not None else 1

    @property
    def apart(self) -> bool:
        """True from the first `model.join()` on: some processes may have no more batches."""
        return self.ranks is not None and self.ranks.apart

    def meet(self) -> bool:
        """Find the processes that train this model, and make sure that all of them watch; return whether there are others."""
        self.met = True
        self.ranks = None
        model, judge = self._layers.model, self._judge
        if model is None:
            return False
        judge.follow_peers(0)
        try:
            ranks = find_ranks(model, self._layers)
        except Unsupported as finding:
            judge.note(f"{finding}: numbers and verdict are those of this process alone.")
            return False
        if ranks is None:
            return False
        own = settings_of(judge.rules, judge.policy, self._pace)
        settings = ranks.agree(own | {"weights left out": ", ".join(self._layers.left_out)})
        if settings is None:
            judge.disarm(
                f"only some of the {ranks.size} processes watch this model, so that numbers are those of this process alone "
                "and auto-clip does not act: call attach() in each of them."
            )
            return False
        if settings and not self._may_exchange(differences(settings, ranks.world)):
            return False
        self.ranks, self._alike = ranks, not settings
        if self._alike:
            judge.follow_peers(1 if device.reading_is_free(self._layers.home) else LAG)
        if ranks.averages:
            self._hooks.stand_sentinel()
        return True

    def _may_exchange(self, found: dict[str, str]) -> bool:
        """Say what differs between the processes, and only watch; False where not even their rows come at the same steps."""
        alone = not found.keys().isdisjoint(PACE)
        self._judge.disarm(
            f"the processes watch this model by different settings ({told(found)}), so that auto-clip does not act"
            + (" and numbers are those of this process alone" if alone else ", and each judges by its own")
            + ": give attach() the same in each of them."
        )
        return not alone

    def leave(self) -> None:
        """Exchange nothing from here on."""
        self.ranks = self._clipped_by_value = None

    def part_company(self) -> None:
        """Go on alone, because `model.join()` was used: some processes may have no more batches."""
        self.leave()
        self._judge.follow_peers(0)
        self._judge.disarm(
            "model.join() was used: from there on numbers are those of this process alone, and auto-clip does not act."
        )

    # One row.

    def expect_row(self) -> None:
        """A row is about to be made: should anything fail from here on, other processes must not wait for it."""
        if self.ranks is not None:
            self.ranks.expect_exchange()
            self._row_is_due = True

    def row_made(self) -> None:
        """Nobody waits for a row of this step any more."""
        self._row_is_due = False

    @property
    def others_wait(self) -> bool:
        """True while the other processes wait for a row that this one has not exchanged."""
        return self._row_is_due and self.ranks is not None and not self.ranks.exchanged

    def word(self, *, every: int, closely: bool, leaves_out: bool) -> Word:
        """Return what this process says of itself with the coming row."""
        return Word(every, closely, self._judge.failed_rules, self._judge.decided, leaves_out)

    def unite(
        self, word: Word, loss: float, source: LossSource, whole: Measured, now: Measured, sampled: Sample
    ) -> tuple[float, LossSource, Culprits | None]:
        """Make the numbers those of all processes, in place; return the mean loss, its source, and where trouble came from."""
        assert self.ranks is not None
        bad = any(not math.isfinite(norm.item()) for norm in self._hooks.own_norms())
        model, looked = self._layers.model, sampled.weight_norm is not None
        buffer_bad = looked and model is not None and bool(buffers_are_bad(model, self._layers.home))
        mine = Local(loss if source != "none" else None, word, bad, self._after, buffer_bad)
        united = self.ranks.unite(mine, whole, now, sampled)
        if looked:
            self.buffers_are_well = not united.buffer_bad
        self._heed(united.agreed)
        self._after = 0.0
        self._settle(united.after_norm)
        if united.loss is None:
            return math.nan, "none", united.culprits
        return united.loss, source if source != "none" else "backward root", united.culprits

    def take(self, numbers: UnpackedRow, *, looked: bool) -> None:
        """Follow what a row that has come over from a device says; ``looked``: buffers were looked at with it."""
        self._settle(numbers.after_norm)
        if looked:
            self.buffers_are_well = not (numbers.ranks[FLAGS] & BUFFER_BAD).any()
        if self.ranks is not None:
            self._heed(self.ranks.agreed(numbers))

    def _heed(self, agreed: Agreed) -> None:
        """Follow what all processes said with a row; in each of them at the same row."""
        self.every, self.closely = agreed.every or self.every, agreed.closely
        self.left_out = self.left_out + 1 if agreed.left_out else 0
        if agreed.failed and self._alike:
            self._judge.switch_off(agreed.failed)
        if agreed.parted:
            who = " and ".join(map(str, agreed.parted))
            self._judge.disarm(
                f"auto-clip has decided otherwise on rank {who} than on the first, so that parameters may differ between "
                "processes; from here on it does not act in any of them. Start again from a checkpoint that all of them load."
            )

    def clipped_by_value(self, row: Row, decision: Decision, before: float, after: Measured | None = None) -> None:
        """Keep a clip whose effect on the norm of the whole is known only with the next exchange.

        ``before`` is the global norm before it, ``after`` what this process measured after it; None where a device exchanges it.
        """
        assert self.ranks is not None
        self._clipped_by_value = row, decision, before
        if after is not None:
            self._after = self.ranks.part_of_square(after)

    def _settle(self, after_norm: float) -> None:
        """Tell what a clip by value left at the step before, now that all processes know."""
        if self._clipped_by_value is not None:
            row, decision, before = self._clipped_by_value
            self._clipped_by_value = None
            self._judge.done(row, decision, min(1.0, after_norm / before) if before > 0 else 1.0)

    def confirm_clip(self, *, well: bool) -> bool:
        """Ask all processes whether a clip of the user's own failed in one of them; if so all leave at the next step."""
        if self.ranks is None or not self._judge.may_clip or self.ranks.all_well(well=well):
            return False
        self.leaving = True
        return True
