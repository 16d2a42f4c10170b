"""Whom the probe asks: it knows the half that judges by this alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import Decision, DevicePlan
    from gradwatch.history.schedule import Bounds
    from gradwatch.measure.layers import Layers
    from gradwatch.records import Row


class Judge(Protocol):
    """Whom rows are reported to: the monitor."""

    def optimizer_found(self, optimizer: Optimizer) -> None:
        """An optimizer of the watched parameters is about to make its first step."""

    def judge(self, row: Row) -> Decision:
        """Take a row; say what to do with its gradients. `done` follows, unless that is nothing."""

    def startled(self, row: Row) -> bool:
        """Say whether a row is out of the ordinary, before it is judged."""

    def bounds(self) -> Bounds | None:
        """Say what the coming rows may be and still go unjudged; None: all are judged."""

    def may_skip(self) -> bool:
        """Say whether a step may ever be left out."""

    def orders(self) -> DevicePlan | None:
        """Say what to do with a step before it is known; None: only watch it."""

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to them."""

    def settings(self) -> dict[str, str]:
        """Return all that decides what is measured, judged and done, to be compared between processes."""

    def together(self, lag: int) -> None:
        """Take note that several processes decide together, who know of each other's failures ``lag`` rows later; 0: no more."""

    def said(self) -> tuple[int, int]:
        """Return the rules that failed here, a bit for each, and a number of what was decided so far."""

    def switch_off(self, rules: int) -> None:
        """Switch off the rules that failed in any process."""

    def disarm(self, reason: str) -> None:
        """Only watch from here on, and say why."""

    @property
    def own_clip(self) -> bool:
        """True where auto-clip is by a clip of the user's own."""

    @property
    def may_clip(self) -> bool:
        """True while a clip of the user's own may act, which may fail in one process alone."""

    def grown(self, layers: Layers) -> None:
        """Parameters were added to the model or replaced."""

    def note(self, text: str) -> None:
        """Say once what cannot be done."""

    def failed(self, part: str, error: Exception) -> None:
        """Take note of an error inside gradwatch; raises it when strict."""
