"""The other processes of a distributed training: found at the first step, then in exchange with this one at each row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch import device
from gradwatch.distributed.agreement import PACE, differences, settings_of, told
from gradwatch.distributed.find import Unsupported, find_ranks
from gradwatch.distributed.words import Agreed, Local, Word
from gradwatch.measure.checkpoints import buffers_are_bad, damage_of_buffers
from gradwatch.measure.readback import LAG

if TYPE_CHECKING:
    from gradwatch.autoclip.decision import Decision
    from gradwatch.distributed.group import Ranks
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.packed_row import UnpackedRow
    from gradwatch.measure.sampling import Sample
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.judge import Judge
    from gradwatch.records import Culprits, LossSource, Row


class Peers:
    """The processes that train the watched model together, including this one.

    Args:
        layers: the watched parameters.
        judge: learns what all processes agree on.
        gradient_hooks: know whether this process's own backward was finite.
        pace: version and measuring interval, which are compared between processes.
        looks: whether this process looks for the origin of non-finite numbers.

    Attributes:
        ranks: the group of processes; None if this process is alone or `meet` was not called yet.
        met: True once `meet` was called.
        every: number of optimizer steps between rows on which all processes agreed with the last row; 0: none yet.
        closely: whether all processes watch closely, as agreed with the last row.
        left_out: number of consecutive steps that the gradient scalers of all processes left out.
        leaving: True if all processes switch off at the next step.
        all_look: whether all processes look for the origin of non-finite numbers.
        buffers_are_well: whether the buffers of all processes were finite when they were last checked.
    """

    def __init__(
        self, layers: Layers, judge: Judge, gradient_hooks: GradientHooks, pace: dict[str, Any], *, looks: bool = False
    ) -> None:
        self._layers = layers
        self._judge = judge
        self._hooks = gradient_hooks
        self._pace = pace
        self._looks = looks
        self.all_look = False
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
        """The number of processes whose values are combined into one row."""
        return self.ranks.size if self.ranks is not None else 1

    @property
    def together(self) -> Ranks | None:
        """The processes, if all of them look for the origin of non-finite numbers."""
        return self.ranks if self.all_look else None

    @property
    def apart(self) -> bool:
        """True since the first `model.join()`, after which some processes may have no more batches."""
        return self.ranks is not None and self.ranks.apart

    def meet(self) -> bool:
        """Find the processes that train this model and compare their settings; return whether rows are exchanged with others."""
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
        own |= {"weights left out": ", ".join(self._layers.left_out), "forensics": str(self._looks)}
        settings = ranks.agree(own)
        if settings is None:
            judge.disarm(
                f"only some of the {ranks.size} processes watch this model, so that numbers are those of this process alone "
                "and auto-clip does not act: call attach() in each of them."
            )
            return False
        found = differences(settings, ranks.world) if settings else {}
        found.pop("forensics", None)
        self.all_look = all(one["forensics"] == str(True) for one in settings or [own])
        if found and not self._report_differences(found):
            return False
        self.ranks, self._alike = ranks, not found
        if self._alike:
            judge.follow_peers(1 if device.reading_is_free(self._layers.home) else LAG)
        if ranks.averages:
            self._hooks.watch_local_gradients()
        return True

    def _report_differences(self, found: dict[str, str]) -> bool:
        """Report the settings that differ and stop auto-clip; return whether rows still come at the same steps."""
        alone = not found.keys().isdisjoint(PACE)
        self._judge.disarm(
            f"the processes watch this model with different settings ({told(found)}), so that auto-clip does not act"
            + (" and numbers are those of this process alone" if alone else ", and each judges by its own")
            + ": pass the same settings to attach() in each of them."
        )
        return not alone

    def leave(self) -> None:
        """Stop exchanging rows."""
        self.ranks = self._clipped_by_value = None

    def part_company(self) -> None:
        """Continue without the other processes, because `model.join()` was used and some may have no more batches."""
        self.leave()
        self._judge.follow_peers(0)
        self._judge.disarm(
            "model.join() was used: from there on numbers are those of this process alone, and auto-clip does not act."
        )

    # One row.

    def expect_row(self) -> None:
        """Record that a row is about to be made, for which other processes wait even if something fails here."""
        if self.ranks is not None:
            self.ranks.expect_exchange()
            self._row_is_due = True

    def row_made(self) -> None:
        """Record that no process waits for a row of this step any more."""
        self._row_is_due = False

    @property
    def others_wait(self) -> bool:
        """True while other processes wait for a row that this one has not exchanged yet."""
        return self._row_is_due and self.ranks is not None and not self.ranks.exchanged

    def word(self, *, every: int, closely: bool, leaves_out: bool) -> Word:
        """Return what this process states about itself with the next row."""
        return Word(every, closely, self._judge.failed_rules, self._judge.decided, leaves_out)

    def unite(
        self, word: Word, loss: float, source: LossSource, whole: Measured, now: Measured, sampled: Sample
    ) -> tuple[float, LossSource, Culprits | None]:
        """Combine the measured values of all processes in place; return the mean loss, its source, and the ranks at fault."""
        assert self.ranks is not None
        bad = any(not math.isfinite(norm.item()) for norm in self._hooks.own_norms())
        looked = sampled.weight_norm is not None
        buffer_bad = looked and self._own_are_bad()
        mine = Local(loss if source != "none" else None, word, bad, self._after, buffer_bad)
        united = self.ranks.unite(mine, whole, now, sampled)
        if looked:
            self.buffers_are_well = not united.buffer_bad
        self._apply_agreement(united.agreed)
        self._after = 0.0
        self._settle(united.after_norm)
        if united.loss is None:
            return math.nan, "none", united.culprits
        return united.loss, source if source != "none" else "backward root", united.culprits

    def look_at_buffers(self) -> bool:
        """Return whether all buffers are finite; of several processes, what their last exchange has said."""
        if self.ranks is None:
            self.buffers_are_well = not self._own_are_bad()
        return self.buffers_are_well

    def _own_are_bad(self) -> bool:
        model, constants = self._layers.model, self._layers.constants
        if model is None or not buffers_are_bad(model, self._layers.home, constants):
            return False
        return bool(damage_of_buffers(model, constants))  # the norms that it goes by may have overflowed

    def take(self, numbers: UnpackedRow, *, looked: bool) -> None:
        """Apply the agreements of a row that has arrived from a device; ``looked`` is True if its buffers were checked."""
        self._settle(numbers.after_norm)
        if looked:
            self.buffers_are_well = numbers.buffers_are_well
        if self.ranks is not None:
            self._apply_agreement(self.ranks.agreed(numbers))

    def _apply_agreement(self, agreed: Agreed) -> None:
        """Apply what all processes agreed on with a row. Each process does this at the same row."""
        self.every, self.closely = agreed.every or self.every, agreed.closely
        self.left_out = self.left_out + 1 if agreed.left_out else 0
        if agreed.failed and self._alike:
            self._judge.switch_off(agreed.failed)
        if agreed.parted:
            who = " and ".join(map(str, agreed.parted))
            self._judge.disarm(
                f"auto-clip has decided differently on rank {who} than on the first, so that parameters may differ between "
                "processes; from here on it does not act in any of them. Start again from a checkpoint that all of them load."
            )

    def clipped_by_value(self, row: Row, decision: Decision, before: float, after: Measured | None = None) -> None:
        """Keep a clip whose effect on the global norm is known only after the next exchange.

        Args:
            row: row whose gradients were clipped.
            decision: decision with the clip.
            before: global norm before the clip.
            after: what this process measured after the clip; None if it is exchanged on a device.
        """
        assert self.ranks is not None
        self._clipped_by_value = row, decision, before
        if after is not None:
            self._after = self.ranks.part_of_square(after)

    def _settle(self, after_norm: float) -> None:
        """Pass the effect of a clip by value at the previous step to the judge, now that all processes know it."""
        if self._clipped_by_value is not None:
            row, decision, before = self._clipped_by_value
            self._clipped_by_value = None
            self._judge.done(row, decision, min(1.0, after_norm / before) if before > 0 else 1.0)

    def confirm_clip(self, *, well: bool) -> bool:
        """Return whether a clip written by the user failed in any process; if so, all switch off at the next step."""
        if self.ranks is None or not self._judge.may_clip or self.ranks.all_well(well=well):
            return False
        self.leaving = True
        return True
