"""Which parameters a backward reached: those whose gradient is another tensor than before, or has changed in place.

This takes no hook. A hook on a single layer would not be enough, since any layer may receive no gradient at some steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch import device
from gradwatch.measure.norms import norm_of
from gradwatch.measure.wrappers import flat_modules, unreduced, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from gradwatch.probe.coming import Loss
    from gradwatch.probe.gradients import Gradients

    Before = list[tuple[Tensor, int] | None]
    Version = Callable[[Tensor], int]

_FAR = 4096  # nodes of a graph that are searched for parameters


class Backward:
    """The gradients of each owner before one backward. It lives as long as that backward.

    Args:
        owners: the owners.
        sharded: the model, if it is sharded by FSDP, which may hold gradients back; else None.
    """

    __slots__ = ("_held", "_hidden", "_known", "_sharded")

    def __init__(self, owners: Sequence[Gradients], sharded: nn.Module | None) -> None:
        self._sharded = sharded
        self._held: Before = _held_back(sharded) if sharded is not None else []
        self._known: list[tuple[Gradients, Before, Version | None]] = []
        self._hidden = [owner for owner in owners if owner.hidden]
        for owner in owners:
            if owner.hidden:
                continue
            version = None
            try:
                if owner.sharded:
                    version = version_of
                    before = _gradients_of(owner, version)
                else:
                    before = [None if (g := one.grad) is None else (g, g._version) for one in owner.parameters]
            except RuntimeError:  # a gradient made under `torch.inference_mode` has no version
                version = version_of
                before = _gradients_of(owner, version)
            self._known.append((owner, before, version))

    @classmethod
    def of(cls, owner: Gradients, before: Before) -> Backward:
        """Return a `Backward` of one owner whose gradients ``before`` it are known already."""
        backward = cls([], None)
        backward._known.append((owner, before, None))
        return backward

    def of_owner(self, owner: Gradients) -> Before:
        """Return the gradients of one owner before the backward; empty if they are not known."""
        return next((before for one, before, _ in self._known if one is owner), [])

    def cleared(self) -> Iterator[tuple[Gradients, list[Tensor]]]:
        """Yield owners that have losses although all their gradients are None or zero.

        Each comes with the gradients whose values are on a device: the owner is to be treated as cleared only if they are
        zero. The list is empty if it is known already.
        """
        for owner, before, _ in self._known:
            if not owner.coming.roots:
                continue
            gradients = [known[0] for known in before if known is not None]
            if not gradients:
                # FSDP2 may hold gradients back while it accumulates; whether FSDP1 does is not known
                if self._sharded is None or not (any(self._held) or flat_modules(self._sharded)):
                    yield owner, []
            elif self._sharded is not None or owner.sharded:
                continue
            elif not all(device.reading_is_free(gradient.device) for gradient in gradients):
                if not owner.coming.is_as_left(gradients[0]):
                    yield owner, gradients
            elif _all_zero(gradients):
                yield owner, []

    def gone(self, owner: Gradients, *, by_value: bool) -> frozenset[int]:
        """Return the columns whose gradient is None, or zero if ``by_value``; some of them may have been cleared."""
        if self._sharded is not None:
            return frozenset()
        before = self.of_owner(owner)
        by_value = by_value and not owner.sharded
        return frozenset(
            column
            for column, known in zip(owner.columns.tolist(), before, strict=True)
            if known is None or (by_value and device.reading_is_free(known[0].device) and _all_zero([known[0]]))
        )

    def reached(self, roots: Any) -> list[tuple[Gradients, frozenset[int] | None]]:
        """Return the owners that a backward from ``roots`` has reached, with the columns reached of one without an optimizer.

        None stands for all columns of an owner.
        """
        return self._changed() + [(owner, None) for owner in self._hidden if owner.is_behind(roots)]

    def _changed(self) -> list[tuple[Gradients, frozenset[int] | None]]:
        if self._sharded is not None and _differ(self._held, _held_back(self._sharded)):
            return [(owner, None) for owner, _, _ in self._known]
        return [
            (owner, self._columns_of(owner, before, version) if owner.optimizer is None else None)
            for owner, before, version in self._known
            if has_changed(owner, before, version)
        ]

    def _columns_of(self, owner: Gradients, before: Before, version: Version | None) -> frozenset[int]:
        now = _gradients_of(owner, version or version_of)
        columns = zip(owner.columns.tolist(), before, now, strict=True)
        return frozenset(column for column, old, new in columns if _differ([old], [new]))


def _gradients_of(owner: Gradients, version: Version) -> Before:
    """Return each gradient with the number of its in-place changes; None for parameters without one."""
    return [None if (g := one.grad) is None else (g, version(g)) for one in owner.parameters]


def has_changed(owner: Gradients, before: Before, version: Version | None) -> bool:
    """Return whether any gradient is another tensor than before or was changed in place; usually the first one is."""
    for parameter, known in zip(owner.parameters, before, strict=True):
        gradient = parameter.grad
        if known is None:
            if gradient is not None:
                return True
        elif gradient is not known[0] or (version(gradient) if version else gradient._version) != known[1]:
            return True
    return False


def _differ(before: Before, now: Before) -> bool:
    return any(
        (old is None) is not (new is None)
        or (old is not None and new is not None and (old[0] is not new[0] or old[1] != new[1]))
        for old, new in zip(before, now, strict=True)
    )


def _held_back(model: nn.Module) -> Before:
    return [None if gradient is None else (gradient, version_of(gradient)) for gradient in unreduced(model)]


def _all_zero(gradients: Iterable[Tensor]) -> bool:
    """Return whether all gradients, which must be readable without waiting, are zero; the smallest is checked first."""
    return not any(
        bool(gradient.any()) if gradient.layout is torch.strided else norm_of(gradient) != 0
        for gradient in sorted(gradients, key=torch.Tensor.numel)
    )


def losses_of(roots: Any) -> list[Loss]:
    """Return the losses from which a backward started; empty unless each of its roots is a single real number.

    A value that can be read without waiting is read now, and any other is copied on its device, since the user may change the
    tensor in place later, and a replayed CUDA graph overwrites it.
    """
    if type(roots) is torch.Tensor:
        roots = (roots,)
    losses: list[Loss] = []
    for root in roots if isinstance(roots, (list, tuple)) else (roots,):
        if not isinstance(root, torch.Tensor) or root.numel() != 1:
            return []
        loss: Any = root.detach()
        if loss.is_cpu and device.reading_is_free(loss.device):
            loss = loss.item()
        losses.append(loss.clone() if isinstance(loss, torch.Tensor) else loss)
        if isinstance(loss, complex):
            return []
    return losses


def parameters_behind(roots: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters that the graph of a backward leads to. The graph can be walked even after the backward."""
    roots = roots if isinstance(roots, (list, tuple)) else [roots]
    nodes = [getattr(root, "grad_fn", None) or getattr(root, "node", None) for root in roots]
    yield from (root for root in roots if isinstance(root, nn.Parameter))
    ahead, seen = [node for node in nodes if node is not None], set(nodes)
    while ahead and len(seen) < _FAR:
        node = ahead.pop()
        if type(node).__name__ == "AccumulateGrad" and isinstance(node.variable, nn.Parameter):
            yield node.variable
        more = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= more
        ahead += more
