"""The owners of watched layers: optimizers that have stepped or were named, and one owner for the rest.

An owner is a `gradwatch.probe.gradients.Gradients`. When it is replaced, as when layers are added to the model or to the
optimizer, what is known of its coming step is passed on.
"""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from gradwatch.probe.coming import Coming, united
from gradwatch.probe.gradients import Gradients
from gradwatch.probe.zero_gradients import EngineGradients, Inside, ZeroGradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.coming import Root


class Owners:
    """The owners of the layers of one model.

    Args:
        layers: the watched parameters.
        grown: called with the columns of layers that were added or replaced, before the owners are made anew; returns the
            losses of the backwards that have reached them.
        found: called with an optimizer that owns some of the layers.

    Attributes:
        sole: the only owner, if it is known that one optimizer owns everything that is trained; else None.
    """

    def __init__(
        self, layers: Layers, grown: Callable[[set[int]], list[Root]], found: Callable[[Optimizer], None]
    ) -> None:
        self._layers = layers
        self._grown = grown
        self._found = found
        self._loose: list[Gradients] = []  # former owners, whose knowledge passes to the rest
        self._numbers = itertools.count()
        self._known: dict[int, Gradients] = {}  # by the optimizer's id
        self._refs: dict[int, weakref.ref[Optimizer]] = {}
        self._rest: Gradients | None = None
        self._all: Gradients | None = None
        self._list: list[Gradients] | None = None
        self.sole: Gradients | None = None

    def current(self) -> list[Gradients]:
        """Return the owners that step, and the rest that no optimizer is known to own."""
        if self._list is None:
            stepping = [mine for mine in self._known.values() if mine.parameters and mine.around is None]
            self._list = [*stepping, *([rest] if (rest := self.rest()).parameters else [])]
            if len(self._list) == 1 and stepping and not stepping[0].sharded:
                self.sole = stepping[0]
        return self._list

    def close(self) -> None:
        """Restore what was changed for steps under way, and drop all references to the parameters."""
        for mine in self._known.values():
            mine.restore()
        self._known.clear()
        self._refs.clear()
        self._loose.clear()
        self._rest = self._all = self.sole = None
        self._list = []

    def get(self, optimizer: Optimizer) -> Gradients | None:
        """Return the gradients of an optimizer, looked up anew if it changed; None if it owns no watched layer."""
        mine = self._known.get(id(optimizer))
        if mine is None or mine.is_stale(optimizer):
            mine = self.find(optimizer)
        return mine if mine.parameters else None

    def known(self, optimizer: Optimizer) -> Gradients | None:
        """Return the gradients of an optimizer as of the last look-up; None if it was never looked up."""
        return self._known.get(id(optimizer))

    def stepping(self, optimizer: Optimizer) -> Gradients | None:
        """Return the gradients that the step of an optimizer uses: those of its inner optimizer if it wraps one."""
        mine = self.get(optimizer)
        inner = mine.around() if mine is not None and mine.around is not None else None
        return mine if inner is None else self.get(inner)

    def look_at_optimizers(self) -> None:
        """Look up all optimizers whose parameters have changed since the last look-up."""
        for ref, mine in zip(tuple(self._refs.values()), tuple(self._known.values()), strict=True):
            optimizer = ref()
            if optimizer is not None and mine.is_stale(optimizer):
                self.find(optimizer)

    def find(self, optimizer: Optimizer) -> Gradients:
        """Look up and return the watched layers that an optimizer owns, even if the model has changed since attach."""
        if any(self._layers.column(one) is None for group in optimizer.param_groups for one in group["params"]):
            self.look_again()
        zero = self._layers.zero
        inner = _around(optimizer) if zero is None or optimizer is not zero.optimizer else None
        mine = self._make(optimizer, weakref.ref(inner) if inner is not None else None)
        if mine.parameters:
            self._found(optimizer)
            if inner is not None:
                self.get(inner)
        return mine

    def look_again(self) -> None:
        """Update the owners for parameters that were added or replaced: adapters, a new head, `load_state_dict(assign=True)`."""
        news = self._layers.look_again()
        if not news:
            return
        for mine in self._known.values():
            mine.restore()
        roots = self._grown(news)
        self._rest = self._all = self._list = self.sole = None
        rest = self.rest()
        rest.coming.forget_clip()
        for loss, reached in roots:
            rest.coming.add([loss], reached)
        for optimizer in filter(None, [ref() for ref in self._refs.values()]):
            self._make(optimizer, self._known[id(optimizer)].around)

    def leave_to_another(self, mine: Gradients) -> bool:
        """Leave the step of an optimizer that wraps another one to that one, if it ever steps; return whether it was left."""
        inner = mine.around() if mine.around is not None else None
        its = self._known.get(id(inner)) if inner is not None else None
        waits = mine.leave_step_to(its)
        if not waits:
            self._list = self.sole = None
        return waits

    def step_is_over(self, mine: Gradients) -> None:
        """Record that the step of an optimizer is over, and with it that of the optimizer that it wraps."""
        inner = mine.around() if mine.around is not None else None
        its = self._known.get(id(inner)) if inner is not None else None
        if its is not None:
            its.outer_is_over()

    def _make(self, optimizer: Optimizer, around: weakref.ref[Optimizer] | None) -> Gradients:
        held, kind = self._held(optimizer)
        owned = [(column, one, number) for one, number in held if (column := self._layers.column(one)) is not None]
        pairs, groups = [(column, one) for column, one, _ in owned], [number for _, _, number in owned]
        old, key = self._known.get(id(optimizer)), id(optimizer)
        same = old is not None and self._refs[key]() is optimizer
        number = -1
        if pairs:
            number = old.number if old is not None and same and old.number >= 0 else next(self._numbers)
        goes_on = around is None and bool(pairs) and same
        coming = old.coming if old is not None and goes_on else Coming()
        model = self._layers.model
        mine = kind(
            *(pairs, len(self._layers), groups, len(held), optimizer, model),
            coming=coming,
            around=around,
            number=number,
        )
        if around is not None:  # what is known of the step belongs to the inner optimizer
            pass
        elif old is not None and goes_on:
            self._hand_over([old, self.rest()], mine)
        elif pairs:  # its gradients arrived while others owned the parameters, or nobody
            self._hand_over(self.current(), mine)
        self._known[key], self._refs[key] = mine, weakref.ref(optimizer, self._forgetter(key))
        # leave everything else alone for an optimizer of another model, which may be trained on another thread
        if pairs or (old is not None and same and old.parameters):
            self._rest = self._all = self._list = self.sole = None
            if any(one.coming.before_clip for one in self._loose):
                self.rest()  # while the gradients are still those whose norms were measured before a clip
        return mine

    def _held(self, optimizer: Optimizer) -> tuple[list[tuple[nn.Parameter, int]], Callable[..., Gradients]]:
        """Return the parameters of an optimizer with the indices of their groups, and the class of its gradients."""
        zero = self._layers.zero
        if zero is not None and optimizer is zero.optimizer:
            return zero.parameters, partial(ZeroGradients, zero)
        held = [(one, number) for number, group in enumerate(optimizer.param_groups) for one in group["params"]]
        if zero is not None and optimizer is zero.inner:
            return held, Inside
        return held, EngineGradients if self._layers.are_stepped_by_engine(optimizer) else Gradients

    def _hand_over(self, before: list[Gradients], mine: Gradients) -> None:
        columns, layers = frozenset(mine.columns.tolist()), len(self._layers)
        knowing = [one for one in before if one.coming.roots or one.coming.before_clip is not None]
        parts = [one.coming.part(one.columns_with_gradient(), columns, layers, mine.parameters) for one in knowing]
        mine.coming.take_over(united(parts, layers, mine.parameters))

    def _forgetter(self, key: int) -> Callable[[weakref.ref[Optimizer]], None]:
        owners = weakref.ref(self)

        def forget(ref: weakref.ref[Optimizer]) -> None:
            here = owners()
            if here is not None:
                here.drop(key, ref)

        return forget

    def drop(self, key: int, ref: weakref.ref[Optimizer]) -> None:
        """Drop an optimizer that no longer exists; what is known of its coming step passes to the rest."""
        if self._refs.get(key) is not ref:
            return
        mine = self._known.pop(key)
        del self._refs[key]
        if mine.parameters:
            self._loose.append(mine)
            self._rest = self._all = self._list = self.sole = None

    def rest(self) -> Gradients:
        """Return the layers that no optimizer is known to own: only trainable ones, or all if there is no optimizer."""
        if self._rest is None:
            stepping = [mine for mine in self._known.values() if mine.around is None]
            owned = {column for mine in stepping for column in mine.columns.tolist()}
            pairs = [(column, one) for column, one in self._layers.parameters() if column not in owned]
            if owned:
                pairs = [(column, one) for column, one in pairs if one.requires_grad]
            self._rest = Gradients(pairs, len(self._layers), coming=Coming())
            self._hand_over(self._loose, self._rest)
            self._loose = [self._rest]
        return self._rest

    def look_at_the_rest(self) -> Gradients:
        """Look up `rest` anew, since some of its parameters may have been unfrozen, and return it."""
        self._rest = self._list = self.sole = None
        return self.rest()

    def everything(self) -> Gradients:
        """Return all watched layers as one owner, with everything that is known of the coming step."""
        if not any(mine.parameters for mine in self._known.values()):
            return self.rest()
        if self._all is None:
            self._all = Gradients(list(self._layers.parameters()), len(self._layers), coming=Coming())
        self._all.coming.take_over(
            united((mine.coming for mine in self.current()), len(self._layers), self._all.parameters)
        )
        return self._all

    def used(self, mine: Gradients) -> None:
        """Record that a step has been made with the gradients of one owner, or with `everything`."""
        mine.coming.used()
        if mine is self._all:
            for one in self.current():
                one.coming.used()


def _around(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer that this one wraps: an attribute of it, with the same parameters. None if there is none."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for one in vars(optimizer).values():
        if isinstance(one, Optimizer) and one is not optimizer:
            its = {id(parameter) for group in one.param_groups for parameter in group["params"]}
            if its == mine:
                return one
    return None
