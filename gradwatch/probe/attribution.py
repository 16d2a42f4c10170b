"""Attribution of backwards to coming steps: a backward belongs to each owner of which it made or changed a gradient."""

from __future__ import annotations

import weakref
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.probe import patches
from gradwatch.probe.backwards import Backward, has_changed, parameters_behind
from gradwatch.probe.clearing import Clearing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.coming import Loss, Root
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.owners import Owners
    from gradwatch.probe.patches import Run

_YOUNG = 64  # backwards during which gradients without a known optimizer are checked one by one
_STRAYS = 64  # backwards through unknown parameters whose losses are kept


class Attribution:
    """Attributes the losses of backwards to the owners they reached. Called for each backward in this process, of any model.

    Args:
        layers: the watched parameters.
        owners: the owners of the parameters.
        gradient_hooks: know whether the model is sharded by FSDP.
        mistaken: called with a sentence on a mistake of the program.

    Attributes:
        backwards: number of backwards of the watched model.
        clearing: notices gradients that are never cleared, and those that are cleared too early.
    """

    def __init__(
        self, layers: Layers, owners: Owners, gradient_hooks: GradientHooks, mistaken: Callable[[str], object]
    ) -> None:
        self._layers = layers
        self._owners = owners
        self._hooks = gradient_hooks
        self._strays: deque[tuple[list[Loss], weakref.ref[nn.Parameter]]] = deque(maxlen=_STRAYS)
        self._threads: set[int] = set()  # threads that called backward on this model
        self.backwards = 0
        self.clearing = Clearing(mistaken)

    def begins(self, run: Run) -> None:
        """Note the gradients that exist before a backward, and forget losses whose gradients were cleared."""
        sole = self._owners.sole
        if sole is None or sole.coming.roots or len(patches.CALLERS) > 1:
            self._begins(run)
            return
        patches.READERS.append(run.thread)  # from here on like `_begins`, on the hot path
        try:
            before = [None if (g := one.grad) is None else (g, g._version) for one in sole.parameters]
            run.notes[id(self)] = sole, before
            if self.clearing.watches:
                self.clearing.begins(sole, before)
        finally:
            patches.READERS.remove(run.thread)

    def _begins(self, run: Run) -> None:
        with patches.reading(run.thread):
            if len(patches.CALLERS) > 1 and not self._may_read(run):
                return
            owners = self._owners.current()
            run.notes[id(self)] = before = Backward(owners, self._layers.model if self._hooks.hookless else None)
            for owner in owners if self.clearing.watches else ():
                self.clearing.begins(owner, before.of_owner(owner))
            if any(owner.coming.roots for owner in owners):
                self._forget_cleared(before)

    def end(self, run: Run, *, fused: bool) -> bool:
        """Attribute a backward that has ended; return whether it was one of this model.

        ``fused`` is True if optimizers of the model have stepped inside it, so that it was.
        """
        note = run.notes.pop(id(self), None)
        if type(note) is not tuple or note[0] is not self._owners.sole or len(patches.CALLERS) > 1:
            return self._end(run, note, fused=fused)
        owner, before = note  # from here on like `_end`, on the hot path
        patches.READERS.append(run.thread)
        try:
            reached = has_changed(owner, before, None)
        finally:
            patches.READERS.remove(run.thread)
        if not reached:
            return self._end(run, note, fused=fused)
        self.backwards += 1
        self._threads.add(run.thread)
        owner.coming.add(run.losses)
        if self.clearing.watches:
            self.clearing.reached(owner)
        return True

    def _end(self, run: Run, note: Any, *, fused: bool) -> bool:
        with patches.reading(run.thread):
            if note is None or (len(patches.CALLERS) > 1 and not self._may_read(run)):
                return False
            before = note if isinstance(note, Backward) else Backward.of(*note)
            reached = before.reached(run.roots)
        if not (reached or fused):
            return self._look_for_overlooked(run)
        self.backwards += 1
        self._threads.add(run.thread)
        losses = run.losses
        for owner, columns in reached:
            _add(owner, owner.own(losses), columns)
            if self.clearing.watches:
                self.clearing.reached(owner)
        return True

    def passed_by(self) -> None:
        """Count a backward of this model that did not go through the patch."""
        self.backwards += 1

    def found(self) -> list[Root]:
        """Return the losses of the backwards that have reached parameters which are watched only now."""
        strays = list(self._strays)
        self._strays.clear()
        if self._hooks.hookless:  # a graph leads to whole parameters, of which the model has only parts under FSDP2
            everything = frozenset(range(len(self._layers)))
            return [(loss, everything) for losses, _ in strays[-1:] for loss in losses]
        known = [(losses, self._layers.column(one)) for losses, ref in strays if (one := ref()) is not None]
        return [(loss, frozenset([column])) for losses, column in known if column is not None for loss in losses]

    def is_elsewhere(self) -> bool:
        """Return whether the model is trained only on other threads, so that its gradients must not be read on this one."""
        return len(patches.CALLERS) > 1 and get_ident() not in self._threads

    def _may_read(self, run: Run) -> bool:
        """Return whether a backward is one of this model, so that no other thread is computing its gradients."""
        key = ~id(self)
        if key not in run.notes:
            run.notes[key] = None  # for reentrant checkpointing, whose graph leads to no parameter
            for parameter in parameters_behind(run.roots):
                run.notes[key] = self._layers.column(parameter) is not None
                if run.notes[key]:
                    break
        return run.notes[key] is True or (run.notes[key] is None and get_ident() in self._threads)

    def _forget_cleared(self, before: Backward) -> None:
        # the user made no step with these gradients, so the losses have no row
        for owner, gradients in before.cleared():
            if gradients:
                owner.coming.weigh(gradients)
            else:
                owner.coming.used()
        rest = self._owners.rest()
        if rest.coming.roots:  # it may belong to several optimizers that have not stepped yet
            rest.coming.lost(before.gone(rest, by_value=self.backwards < _YOUNG))

    def _look_for_overlooked(self, run: Run) -> bool:
        """Return whether a backward reached layers that were frozen at the last look-up; keep losses of unknown parameters."""
        parameter = next(parameters_behind(run.roots), None)
        if parameter is None:
            return False
        if self._layers.column(parameter) is None:
            self._strays.append((run.losses, weakref.ref(parameter)))
            return False
        rest = self._owners.look_at_the_rest()
        columns = rest.columns[[one.grad is not None for one in rest.parameters]]
        if not len(columns):
            return False
        self.backwards += 1
        self._threads.add(run.thread)
        _add(rest, run.losses, frozenset(columns.tolist()))
        return True


def _add(owner: Gradients, losses: list[Loss], columns: frozenset[int] | None) -> None:
    owner.coming.add(losses, columns)
    if losses and isinstance(losses[0], torch.Tensor):  # on a device
        gradient = next((one.grad for one in owner.parameters if one.grad is not None), None)
        if gradient is not None:
            owner.coming.leave(gradient)
