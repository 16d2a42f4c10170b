"""The interface by which the probe asks what to do. The probe knows the judging half only through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.autoclip.decision import Decision, DevicePlan
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.history.columns import Columns
    from gradwatch.history.schedule import Bounds
    from gradwatch.records import Behind, Facts, Family, Row
    from gradwatch.rules import Rule


class Judge(Protocol):
    """Judges rows and decides what to do with their gradients. Implemented by `gradwatch.pipeline.Pipeline`."""

    @property
    def rules(self) -> Sequence[Rule]:
        """The rules with which rows are judged."""

    @property
    def policy(self) -> AutoClip | None:
        """The policy of auto-clip; None if gradwatch only watches."""

    @property
    def exploding(self) -> bool:
        """True while an incident of an explosion is open."""

    @property
    def may_skip(self) -> bool:
        """True if the policy allows steps to be left out."""

    @property
    def own_clip(self) -> bool:
        """True if the clip of auto-clip, armed or not, is a class written by the user."""

    @property
    def may_clip(self) -> bool:
        """True while a clip written by the user may act. It may fail in a single process."""

    @property
    def failed_rules(self) -> int:
        """The rules that failed in this process, one bit each."""

    @property
    def decided(self) -> int:
        """A hash of the decisions of auto-clip so far, which processes that train together compare."""

    def optimizer_found(self, name: str, family: Family, options: Mapping[str, str]) -> None:
        """Record that an optimizer of watched parameters was found: at its first step, or because the user named it."""

    def loss_found(self, kind: str, prediction: tuple[int, ...], behind: Behind, *, mean: bool) -> None:
        """Record what is known of the losses of the backwards so far; see `gradwatch.probe.loss_node.SeenLoss`."""

    def losses_add_up(self) -> None:
        """Record that the loss of a row is the sum of those of several backwards."""

    def losses_oppose(self) -> None:
        """Record that two optimizers take turns, where the loss of one runs through what the other trains."""

    def grown(self, columns: Columns, facts: Facts) -> None:
        """Extend everything to the columns of parameters that were added to the model or replaced."""

    def judge(self, row: Row) -> Decision:
        """Judge a row and return what to do with its gradients; `done` is called next."""

    def is_unusual(self, row: Row) -> bool:
        """Return whether a row that has not been judged yet is out of the ordinary."""

    def bounds(self) -> Bounds | None:
        """Return the bounds within which the coming rows need not be judged; None if each row is judged."""

    def plan(self, ahead: int = 0) -> DevicePlan | None:
        """Return what to do with the coming step, ``ahead`` steps after the last row that was judged; None: only watch it."""

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Record what was done to the gradients of a row; ``coefficient`` is the norm after over the norm before."""

    def follow_peers(self, lag: int) -> None:
        """Set after how many rows the processes know of each other's failures; 0: this process decides alone."""

    def switch_off(self, rules: int) -> None:
        """Switch off the rules that failed in any process, given as one bit each."""

    def disarm(self, reason: str) -> None:
        """Stop auto-clip for the rest of the run and report the reason."""

    def note(self, text: str) -> None:
        """Report once what gradwatch cannot do."""

    def mistake(self, text: str) -> None:
        """Report once a mistake of the program that is certain; advice names it first."""

    def part_failed(self, part: str, error: Exception) -> None:
        """Report that a part of gradwatch raised and is switched off; raise its error if strict."""
