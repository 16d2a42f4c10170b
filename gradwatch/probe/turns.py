"""Two optimizers that take turns, where the loss of one runs through what the other trains: their losses need not fall.

So it is with a generator and its discriminator, and with an actor and its critic. The gradients that such a loss leaves in the
other's parameters are never used: when that optimizer steps, a backward of its own has come since.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from gradwatch.probe.backwards import parameters_behind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

_ENOUGH = 8  # turns after which it is known
_LONGEST = 64  # steps after which it is no longer looked for
_MOST = 8  # optimizers that are followed


class Turns:
    """Finds out whether optimizers of this process take turns so. Graphs are walked only while it does and two have stepped.

    Args:
        owns: returns whether an optimizer holds parameters of the watched model.
        found: called once if two optimizers, one of the watched model among them, take turns.

    Attributes:
        watches: True until it is known, or was not seen for long.
    """

    def __init__(self, owns: Callable[[Optimizer], bool], found: Callable[[], None]) -> None:
        self._owns = owns
        self._found = found
        self._steps = self._backwards = 0
        self._optimizers: dict[int, weakref.ref[Optimizer]] = {}
        self._held: dict[int, frozenset[int]] = {}
        self._reached: dict[int, int] = {}  # by optimizer: the last backward that reached its parameters
        # by optimizer: the last backward that reached it and served the step of another, and that other
        self._foreign: dict[int, tuple[int, int]] = {}
        self._turns: dict[frozenset[int], int] = {}  # by pair of optimizers
        self._known = False
        self.watches = True

    def again(self) -> None:
        """Look for it anew, because another optimizer has come."""
        if not self._known:
            self._steps, self.watches = 0, True

    def backward_ended(self, roots: Any) -> None:
        """Record which of the optimizers a backward has reached."""
        self._backwards += 1
        if len(self._held) < 2:
            return
        reached = {id(parameter) for parameter in parameters_behind(roots)}
        for key, held in tuple(self._held.items()):  # other models may be trained on other threads
            if not held.isdisjoint(reached):
                self._reached[key] = self._backwards

    def stepped(self, optimizer: Optimizer) -> None:
        """Record a step of any optimizer of this process."""
        key = id(optimizer)
        self._steps += 1
        if not self._follows(optimizer):
            return
        mine, foreign = self._reached.get(key), self._foreign.pop(key, None)
        if mine is not None:
            if foreign is not None:
                self._count(key, foreign[1], opposed=mine > foreign[0])
            for other, backward in tuple(self._reached.items()):
                if backward == mine and self._train_apart(key, other):
                    self._foreign[other] = (backward, key)
        self.watches = not self._known and self._steps < _LONGEST

    def _count(self, one: int, other: int, *, opposed: bool) -> None:
        pair = frozenset((one, other))
        self._turns[pair] = self._turns.get(pair, 0) + 1 if opposed else 0
        if self._turns[pair] < _ENOUGH or self._known:
            return
        both = [optimizer for key in pair if (optimizer := self._optimizers[key]()) is not None]
        if any(map(self._owns, both)):
            self._known = True
            self._found()

    def _train_apart(self, one: int, other: int) -> bool:
        """Return whether each of two optimizers trains something that the other does not, unlike a wrapper and what it wraps."""
        return not (self._held[one] <= self._held[other] or self._held[other] <= self._held[one])

    def _follows(self, optimizer: Optimizer) -> bool:
        key = id(optimizer)
        ref = self._optimizers.get(key)
        if (ref is None and len(self._optimizers) < _MOST) or (ref is not None and ref() is not optimizer):
            self._optimizers[key] = weakref.ref(optimizer)
            self._held[key] = frozenset(id(one) for group in optimizer.param_groups for one in group["params"])
        return key in self._optimizers
