"""Who owns which watched layers: the optimizers that have stepped or were named, and nobody for the rest.

An owner is a `gradwatch.probe.gradients.Gradients`; what is known of its coming step goes with it when it is made anew, as when
layers are added to the model or to the optimizer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from gradwatch.probe.coming import Coming, united
from gradwatch.probe.gradients import Gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.coming import Root


class Owners:
    """The owners of one model's layers.

    Args:
        layers: the watched parameters.
        grown: told of the columns of layers that were added or replaced, before the owners are made anew; returns the losses
            that backwards through them began from.
        found: told of an optimizer that owns some of them.

    Attributes: ``sole`` is the one owner, as far as it is known already that an optimizer owns all that is trained.
    """

    def __init__(
        self, layers: Layers, grown: Callable[[set[int]], list[Root]], found: Callable[[Optimizer], None]
    ) -> None:
        self._layers = layers
        self._grown = grown
        self._found = found
        self._loose: list[Gradients] = []  # what the rest is made of
        self._numbers = itertools.count()
        self._known: dict[int, Gradients] = {}  # by the optimizer's id
        self._refs: dict[int, weakref.ref[Optimizer]] = {}
        self._rest: Gradients | None = None
        self._all: Gradients | None = None
        self._list: list[Gradients] | None = None
        self.sole: Gradients | None = None

    def current(self) -> list[Gradients]:
        """Return those that step, and the rest that no optimizer is known to own."""
        if self._list is None:
            stepping = [mine for mine in self._known.values() if mine.parameters and mine.around is None]
            self._list = [*stepping, *([rest] if (rest := self.rest()).parameters else [])]
            if len(self._list) == 1 and stepping and not stepping[0].sharded:
                self.sole = stepping[0]
        return self._list

    def close(self) -> None:
        """Give back what was hidden, and let go of the parameters."""
        for mine in self._known.values():
            mine.restore()
        self._known.clear()
        self._refs.clear()
        self._loose.clear()
        self._rest = self._all = self.sole = None
        self._list = []

    def get(self, optimizer: Optimizer) -> Gradients | None:
        """Return what an optimizer owns; None when it owns no watched layer."""
        mine = self._known.get(id(optimizer))
        if mine is None or mine.is_stale(optimizer):
            mine = self.find(optimizer)
        return mine if mine.parameters else None

    def known(self, optimizer: Optimizer) -> Gradients | None:
        """Return what it owned when it was looked at last."""
        return self._known.get(id(optimizer))

    def stepping(self, optimizer: Optimizer) -> Gradients | None:
        """Return the same; for an optimizer around another one that steps, what that one owns."""
        mine = self.get(optimizer)
        inner = mine.around() if mine is not None and mine.around is not None else None
        return mine if inner is None else self.get(inner)

    def look_at_optimizers(self) -> None:
        """Follow those whose parameters are others than when they were looked at last."""
        for ref, mine in zip(tuple(self._refs.values()), tuple(self._known.values()), strict=True):
            optimizer = ref()
            if optimizer is not None and mine.is_stale(optimizer):
                self.find(optimizer)

    def find(self, optimizer: Optimizer) -> Gradients:
        """Look up which watched layers an optimizer owns; the model may have changed since attach."""
        if any(self._layers.column(one) is None for group in optimizer.param_groups for one in group["params"]):
            self.look_again()
        inner = _around(optimizer)
        mine = self._make(optimizer, weakref.ref(inner) if inner is not None else None)
        if mine.parameters:
            self._found(optimizer)
            if inner is not None:
                self.get(inner)
        return mine

    def look_again(self) -> None:
        """Follow parameters that were added or replaced: adapters, a new head, `load_state_dict(assign=True)`."""
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
        """Leave the step of an optimizer around another one to that one, if it ever steps; return whether it is."""
        inner = mine.around() if mine.around is not None else None
        its = self._known.get(id(inner)) if inner is not None else None
        waits = mine.leave_step_to(its)
        if not waits:
            self._list = self.sole = None
        return waits

    def step_is_over(self, mine: Gradients) -> None:
        """The step of an optimizer is over, and with it that of the one that it is around."""
        inner = mine.around() if mine.around is not None else None
        its = self._known.get(id(inner)) if inner is not None else None
        if its is not None:
            its.outer_is_over()

    def _make(self, optimizer: Optimizer, around: weakref.ref[Optimizer] | None) -> Gradients:
        held = [(one, number) for number, group in enumerate(optimizer.param_groups) for one in group["params"]]
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
        mine = Gradients(
            *(pairs, len(self._layers), groups, len(held), optimizer, model),
            coming=coming,
            around=around,
            number=number,
        )
        if around is not None:  # what there is to step with is that one's
            pass
        elif old is not None and goes_on:
            self._hand_over([old, self.rest()], mine)
        elif pairs:  # what it is about to step with came while others owned it, or nobody
            self._hand_over(self.current(), mine)
        self._known[key], self._refs[key] = mine, weakref.ref(optimizer, self._forgetter(key))
        # of another model's optimizer nothing else is touched: that model may be trained on another thread
        if pairs or (old is not None and same and old.parameters):
            self._rest = self._all = self._list = self.sole = None
            if any(one.coming.before_clip for one in self._loose):
                self.rest()  # while the gradients are still those that its share of a clip was measured from
        return mine

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
        """An optimizer is gone: what was to be stepped with is there for another one."""
        if self._refs.get(key) is not ref:
            return
        mine = self._known.pop(key)
        del self._refs[key]
        if mine.parameters:
            self._loose.append(mine)
            self._rest = self._all = self._list = self.sole = None

    def rest(self) -> Gradients:
        """Return what no optimizer is known to own: where there is none, everything, else what is trained."""
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
        """Return the same, where some of it may be trained since it was looked at last."""
        self._rest = self._list = self.sole = None
        return self.rest()

    def everything(self) -> Gradients:
        """Return all watched layers as if one owned them, with all that is known of the coming step."""
        if not any(mine.parameters for mine in self._known.values()):
            return self.rest()
        if self._all is None:
            self._all = Gradients(list(self._layers.parameters()), len(self._layers), coming=Coming())
        self._all.coming.take_over(
            united((mine.coming for mine in self.current()), len(self._layers), self._all.parameters)
        )
        return self._all

    def used(self, mine: Gradients) -> None:
        """A step has been made with the gradients of one owner, or with everything."""
        mine.coming.used()
        if mine is self._all:
            for one in self.current():
                one.coming.used()


def _around(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer that this one was built around: one it holds, over the same parameters."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for one in vars(optimizer).values():
        if isinstance(one, Optimizer) and one is not optimizer:
            its = {id(parameter) for group in one.param_groups for parameter in group["params"]}
            if its == mine:
                return one
    return None
