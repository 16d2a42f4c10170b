"""What is known of the coming step of an optimizer: its losses, and its norms before the user's own clip.

Both belong to gradients, and are dropped when a step has used these or the user has cleared them.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch import device
from gradwatch.history.columns import widened
from gradwatch.measure.measured_gradients import Measured, assembled
from gradwatch.measure.norms import norm_tensor, on_device
from gradwatch.measure.readback import Unread, joined
from gradwatch.measure.wrappers import version_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    Loss = float | Tensor  # a tensor where its number would have to be waited for
    Root = tuple[Loss, frozenset[int] | None]

_KEPT = 64  # roots that are kept apart; more are summed
_BY_VALUE = 2  # in-place changes by which `clip_grad_value_` clips; its end is not seen


def _trained(parameters: Iterable[nn.Parameter]) -> nn.Parameter | None:
    """Return the first trainable parameter with a gradient, or else the first frozen one, whose gradient may be old."""
    frozen = None
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.requires_grad:
                return parameter
            frozen = parameter if frozen is None else frozen
    return frozen


class BeforeClip:
    """The norms of one owner's gradients before the user's own clip. The gradients are not kept alive.

    Args:
        parameters: parameters that were measured. The first and the last gradient stand for all: the norms are valid as long
            as these are the same tensors.
        measured: the norms; None if they are passed to `take` later. Its list of gradients is emptied.

    Attributes:
        measured: the norms; None if they are not known yet.
        bound: norm to which the user clipped; None if that was not seen, as of a clip by value.
    """

    __slots__ = ("_clipped", "_marks", "_open", "_versions", "bound", "measured")

    def __init__(self, parameters: Sequence[nn.Parameter], measured: Measured | Unread | None = None) -> None:
        if measured is not None:
            measured.gradients = []
        self.measured = measured
        first, last = _trained(parameters), _trained(reversed(parameters))
        marked = [(one, one.grad) for one in (first, last) if one is not None and one.grad is not None]
        self._marks = [(parameter, weakref.ref(gradient)) for parameter, gradient in marked]
        self._versions = [version_of(gradient) for _, gradient in marked]
        self._open = True  # whether the clip may still be under way
        self._clipped = False  # by a clip before that one
        self.bound: float | None = None

    @property
    def clips(self) -> bool:
        """True if the user clips; False if no clip so far had a bound, since programs compute a norm by such ones."""
        return self._clipped or self.bound != math.inf

    @property
    def acted(self) -> bool:
        """True if the gradients were clipped, and not only measured."""
        return self._changed if self.bound is None else self.bound < math.inf

    @property
    def _changed(self) -> bool:
        marked = zip(self._marks, self._versions, strict=True)
        return any(one.grad is not None and version_of(one.grad) != then for (one, _), then in marked)

    def divide(self, scale: float | Tensor) -> None:
        """Divide the norms by the loss scale that the gradients had when they were clipped."""
        measured = self.measured
        if isinstance(measured, Unread):
            by = device.moved(scale, measured.norms.device) if isinstance(scale, torch.Tensor) else scale
            self.measured = replace(measured, norms=measured.norms / by)
        elif measured is not None:
            norm = measured.global_norm / float(scale)
            self.measured = replace(measured, norms=measured.norms / float(scale), global_norm=norm)

    @property
    def holds(self) -> bool:
        """True while the first and the last gradient are the tensors that were measured."""
        return all(ref() is parameter.grad for parameter, ref in self._marks)

    def next_begins(self) -> bool:
        """Record that another clip begins; return whether it belongs to the same step: only clips have changed the gradients."""
        was_open, clips, before = self._open, self.clips, self._versions
        self.ended()
        self._open = True
        changes = [now - then for now, then in zip(self._versions, before, strict=True)]
        # torch announces a clip by norm twice, before either half; one by value is not seen to end
        self._clipped = self._clipped or any(changes) if was_open else clips
        return self.holds and all(change <= (_BY_VALUE if was_open else 0) for change in changes)

    def take(self, measured: Measured) -> None:
        """Set the norms, if they become known only after the clip."""
        self.measured = measured

    def ended(self, bound: float | None = None) -> None:
        """Record that the user's clip to ``bound`` is over, so that later changes of the gradients are not due to it."""
        self._open, self.bound = False, bound
        self._versions = [version_of(one.grad) if one.grad is not None else 0 for one, _ in self._marks]

    def joined_by(self, measured: Measured | Unread, layers: int) -> Measured | Unread:
        """Return the norms with those of ``measured`` added for gradients that have arrived since; ``layers`` in all."""
        assert self.measured is not None
        news = ~np.isin(measured.columns, self.measured.columns)
        if isinstance(measured, Unread):
            part: Measured | Unread = Unread(
                [], measured.columns[news], measured.norms[_indices_of(news, measured.norms)]
            )
        else:
            part = measured.only(measured.columns[news])
        return _together([self.measured, part], layers)

    def of(self, now: Measured) -> Measured:
        """Return the norms of the gradients that exist ``now``; ``now`` itself if some of these came after the clip."""
        if not isinstance(self.measured, Measured) or not np.isin(now.columns, self.measured.columns).all():
            return now
        return self.measured.only(now.columns)

    def only(self, columns: Collection[int], layers: int, parameters: Sequence[nn.Parameter]) -> BeforeClip | None:
        """Return the norms of ``columns``, which belong to ``parameters``, extended to ``layers`` columns; None without any."""
        if self.measured is None or not self.holds:
            return None
        there = np.isin(self.measured.columns, list(columns))
        if not there.any():
            return None
        kept = self.measured.columns[there]
        part: Measured | Unread
        if isinstance(self.measured, Unread):
            norms = self.measured.norms
            part = Unread([], kept, norms if there.all() else norms[_indices_of(there, norms)])
        else:
            part = self.measured.only(kept)
            codes = widened(part.nonfinite, layers, 0) if part.nonfinite is not None else None
            part = replace(part, norms=widened(part.norms, layers, math.nan), nonfinite=codes)
        mine = BeforeClip(parameters, part)
        mine._open, mine._clipped, mine.bound = self._open, self._clipped, self.bound
        return mine


def _indices_of(chosen: NDArray[np.bool_], norms: Tensor) -> Tensor:
    return on_device(np.flatnonzero(chosen), norms.device)


class Coming:
    """What is known of the coming step of one owner.

    Attributes:
        roots: losses of the backwards that reached its parameters since their gradients were cleared or used, each with the
            columns that it reached (None: all of the owner).
        earlier: those of the roots that came before the closure under evaluation.
        before_clip: norms before the user's clip; None if the user has not clipped.
        spent: whether a step has used the gradients of the last backward.
    """

    __slots__ = ("_left", "before_clip", "earlier", "roots", "spent")

    def __init__(self) -> None:
        self.roots: list[Root] = []
        self.earlier: list[Root] = []
        self.before_clip: BeforeClip | None = None
        self.spent = False
        self._left: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def clips(self) -> bool:
        """True if the user has clipped, other than without a bound to compute a norm."""
        return self.before_clip is not None and self.before_clip.clips

    def clip_begins(self, before: BeforeClip) -> None:
        """Set the norms before the user's clip."""
        self.before_clip = before

    def forget_clip(self) -> None:
        """Drop the norms before the user's clip, because the step will use other gradients."""
        self.before_clip = None

    def add(self, losses: Sequence[Loss], reached: frozenset[int] | None = None) -> None:
        """Add the losses of a backward that has reached the columns ``reached`` (None: all of the owner).

        Norms before an earlier clip are dropped, since the backward has changed the gradients.
        """
        self.before_clip, self.spent = None, False
        if len(self.roots) >= _KEPT:  # for example of an optimizer that never steps again
            self._collapse()
        for loss in losses:
            self.roots.append((loss, reached))

    def _collapse(self) -> None:
        homes = [loss.device for loss, _ in self.roots if isinstance(loss, torch.Tensor)]
        total: Loss = sum(
            device.moved(loss, homes[0]) if isinstance(loss, torch.Tensor) else loss for loss, _ in self.roots
        )
        reached = [columns for _, columns in self.roots]
        known = None if None in reached else frozenset().union(*(columns for columns in reached if columns is not None))
        self.roots[:] = [(total, known)]

    def leave(self, gradient: Tensor) -> None:
        """Remember one gradient as a backward has left it, since checking all gradients on a device is not free."""
        self._left = weakref.ref(gradient), version_of(gradient)

    def is_as_left(self, gradient: Tensor) -> bool:
        """Return whether ``gradient`` is the one passed to `leave`, unchanged since."""
        return self._left is not None and self._left[0]() is gradient and self._left[1] == version_of(gradient)

    def weigh(self, gradients: Sequence[Tensor]) -> None:
        """Replace the losses by zero if all of these gradients are zero, decided on their device without reading them."""
        if any(gradient.is_sparse for gradient in gradients):  # cannot be decided without waiting
            return
        home = next((one.device for one in gradients if not one.is_cpu), gradients[0].device)
        kept = torch.stack([device.moved(norm_tensor(one), home, device.widest_float(home)) for one in gradients]).any()
        for roots in (self.roots, self.earlier):
            roots[:] = [(_where(kept, loss), columns) for loss, columns in roots]

    def evaluate(self) -> None:
        """Record that a closure is about to be evaluated, which may clear the gradients or add to them."""
        self.earlier = list(self.roots)

    def lost(self, columns: frozenset[int]) -> None:
        """Remove columns whose gradients were cleared; a loss remains as long as it has reached other columns."""
        left = [(loss, None if reached is None else reached - columns) for loss, reached in self.roots]
        self.roots[:] = [(loss, reached) for loss, reached in left if reached is None or reached]

    def take_over(self, other: Coming) -> None:
        """Replace the roots and the norms before the clip by those of ``other``."""
        self.roots, self.before_clip = list(other.roots), other.before_clip

    def part(
        self, with_gradient: frozenset[int], columns: frozenset[int], layers: int, parameters: Sequence[nn.Parameter]
    ) -> Coming:
        """Return what is known of a part of the columns.

        Args:
            with_gradient: columns of this owner that have a gradient.
            columns: columns of the part.
            layers: total number of columns.
            parameters: parameters of the part.
        """
        part = Coming()
        for loss, reached in self.roots:
            shared = (with_gradient if reached is None else reached) & columns
            if shared:
                part.roots.append((loss, shared))
        if self.before_clip is not None:
            part.before_clip = self.before_clip.only(columns, layers, parameters)
        return part

    def used(self) -> None:
        """Clear everything, because a step was made with the gradients or they were cleared."""
        self.spent = self.spent or bool(self.roots)
        self.roots.clear()
        self.earlier.clear()
        self.before_clip = None


def _where(kept: Tensor, loss: Loss) -> Tensor:
    if not isinstance(loss, torch.Tensor):
        loss = torch.full((), loss, dtype=device.widest_float(kept.device), device=kept.device)
    return torch.where(device.moved(kept, loss.device), loss, 0.0)


def united(parts: Iterable[Coming], layers: int, parameters: Sequence[nn.Parameter]) -> Coming:
    """Return what several owners know, combined for one owner of ``parameters``; each loss counts once."""
    whole = Coming()
    roots: dict[int, Root] = {}
    before: list[BeforeClip] = []
    for part in parts:
        roots |= {id(root[0]): root for root in part.roots}
        if part.before_clip is not None and part.before_clip.holds:
            before.append(part.before_clip)
    whole.roots = list(roots.values())
    if len(before) == 1:
        whole.before_clip = before[0]
    elif before:
        whole.before_clip = BeforeClip(parameters, _together([one.measured for one in before if one.measured], layers))
        whole.before_clip.ended(None if any(one.clips for one in before) else math.inf)
    return whole


def _together(parts: list[Measured | Unread], layers: int) -> Measured | Unread:
    unread = [part for part in parts if isinstance(part, Unread)]
    return joined(unread) if unread else assembled([part for part in parts if isinstance(part, Measured)], layers)
