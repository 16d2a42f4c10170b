"""Whom the probe asks: it knows the half that judges by this alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.autoclip.decision import Decision, DevicePlan
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.history.columns import Columns
    from gradwatch.history.schedule import Bounds
    from gradwatch.records import Facts, Family, Row
    from gradwatch.rules import Rule


class Judge(Protocol):
    """Judges rows: the pipeline."""

    @property
    def rules(self) -> Sequence[Rule]:
        """The rules that it judges with."""

    @property
    def policy(self) -> AutoClip | None:
        """Auto-clip's policy; None when gradwatch only watches."""

    @property
    def exploding(self) -> bool:
        """True while an incident of an explosion is open."""

    @property
    def may_skip(self) -> bool:
        """True where a step may ever be left out."""

    @property
    def own_clip(self) -> bool:
        """True where auto-clip, armed or not, is by a clip of the user's own."""

    @property
    def may_clip(self) -> bool:
        """True while a clip of the user's own may act, which may fail in one process alone."""

    @property
    def failed_rules(self) -> int:
        """The rules that failed here, a bit for each."""

    @property
    def decided(self) -> int:
        """A number of what auto-clip has decided so far; processes that train together compare it."""

    def optimizer_found(self, name: str, family: Family) -> None:
        """Take note of an optimizer of the watched parameters that is about to make its first step."""

    def grown(self, columns: Columns, facts: Facts) -> None:
        """Take the columns of parameters that were added to the model or replaced."""

    def judge(self, row: Row) -> Decision:
        """Judge a row; return what to do with its gradients. `done` follows, unless that is nothing."""

    def is_unusual(self, row: Row) -> bool:
        """Return whether a row is out of the ordinary, before it is judged."""

    def bounds(self) -> Bounds | None:
        """Return what the coming rows may be and still go unjudged; None: all are judged."""

    def plan(self) -> DevicePlan | None:
        """Return what to do with the coming step, before its numbers are known; None: only watch it."""

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to a row's gradients."""

    def follow_peers(self, lag: int) -> None:
        """Take note that several processes decide together, who know of each other's failures ``lag`` rows later; 0: no more."""

    def switch_off(self, rules: int) -> None:
        """Switch off the rules that failed in any process, a bit for each."""

    def disarm(self, reason: str) -> None:
        """Only watch from here on, and say why."""

    def note(self, text: str) -> None:
        """Say once what cannot be done."""

    def part_failed(self, part: str, error: Exception) -> None:
        """Note that a part of gradwatch raised and is switched off; raise its error when strict."""
