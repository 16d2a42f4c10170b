"""Whether the rules that expect the loss to fall rest, because it need not, or because there is no one loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.history.losses import APART
from gradwatch.history.optimizer_rows import with_losses_of_their_own

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.history.history import History
    from gradwatch.verdict.alarms import Alarms
    from gradwatch.verdict.recurring import Recurring

_RULES = ("GW101", "GW104", "GW105", "GW106", "GW405")  # those that expect the loss to fall
_TURNS = (
    64  # rows after which it is looked for optimizers with losses of their own, a multiple of those between judged rows
)
_RAISED = "the optimizer raises it (maximize=True)"
_OPPOSED = "two optimizers take turns, and the loss of one runs through what the other trains"


class Resting:
    """Lets the rules that expect the loss to fall rest.

    Args:
        history: the history of the run, which holds why they rest.
        alarms: the state of the rules.
        recurring: the jumps of the loss that no update has caused.
        note: reports a sentence to the user once.
    """

    def __init__(self, history: History, alarms: Alarms, recurring: Recurring, note: Callable[[str], None]) -> None:
        self._history = history
        self._alarms = alarms
        self._recurring = recurring
        self._note = note

    def look(self) -> None:
        """Let the rules rest where the loss need not fall, and note it."""
        why = self._why()
        if why == self._history.resting:
            return
        self._history.rest_loss(why)
        if why:
            need, rules = "the loss may be one that need not fall", list(_RULES)
            if why == APART:  # that one of them runs away is seen all the same
                need, rules = "there is no one loss that must fall", [one for one in _RULES if one != "GW104"]
            self._note(f"{need}: {why}. The rules that expect it rest ({', '.join(rules)}).")

    def _why(self) -> str:
        resting, last = self._history.resting, self._recurring.last
        if self._history.opposed:
            return _OPPOSED
        begun = not math.isnan(self._history.largest_first_loss)
        if begun and self._history.facts.maximizes and not self._history.is_raised:
            return _RAISED
        if last.routine and (resting or not self._one_fires()):
            return f"it jumps about every {last.period} steps farther than an update can raise it (a target network, a new task)"
        if self._history.rows % _TURNS:
            return resting if resting == APART else ""
        return APART if self._are_apart() else ""

    def _are_apart(self) -> bool:
        return not self._one_fires() and bool(with_losses_of_their_own(self._history))

    def _one_fires(self) -> bool:
        """Return whether one of these rules fires: its incident would seem resolved if it went to rest."""
        return any(code.split()[0] in _RULES for code in self._alarms.firing_rules())
