"""The model's buffers before the forwards of a step, so that a step that is left out can give them back.

A batch that is not finite goes through the running statistics of normalisation before its gradients are seen. So after each
step that is made, the buffers that change are copied side by side into one tensor: one call for all of a kind. Torch's batch
normalisation changes its buffers without counting the change, and so does writing through ``.data``: what a normalisation
holds, and what was ever seen to differ, is copied each time; the rest when torch counts a change or it was replaced.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradwatch.measure import device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.measure.layers import Layers

_LOOKED = 16  # first steps after which every buffer is compared with what it was, and every so many after them
_SELDOM = 64


class _Group:
    """Buffers of one device and dtype: ``now`` are views of them, ``last`` and ``before`` their values, side by side."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.now = [
            tensor.data.view(-1) for tensor in tensors
        ]  # what is written through ``.data`` is no change to autograd
        self.last = torch.cat(self.now)
        self.before = self.last.clone()
        self._sizes = [view.numel() for view in self.now]

    def keep(self) -> None:
        torch.cat(self.now, out=self.last)

    def parts(self) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.before.split(self._sizes)
        return parts

    def give_back(self) -> None:
        torch._foreach_copy_(self.now, self.parts())
        self.last.copy_(self.before)

    def give_back_where(self, bad: Tensor) -> None:
        self.keep()
        chosen = torch.where(bad.to(self.last.device, non_blocking=True), self.before, self.last)
        self.last.copy_(chosen)
        torch._foreach_copy_(self.now, chosen.split(self._sizes))

    @property
    def strayed(self) -> bool:
        """True when one of them lies elsewhere by now."""
        return any(one.data_ptr() != view.data_ptr() for one, view in zip(self.tensors, self.now, strict=True))


class Buffers:
    """The buffers of one model. Call `begin` before each step, then `keep`, `give_back` or `give_back_where`, then `stepped`."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._places: list[tuple[dict[str, Any], str, str]] = []
        self._objects: list[Tensor | None] = []
        self._ids: list[int] = []
        self._changing: set[int] = set()
        self._groups: list[_Group] = []
        self._constant: list[_Group] = []
        self._versions = 0
        self._loose: set[tuple[int, str]] = set()  # places where the tensor is another one each time, or no plain one
        self._now: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {}
        self._before: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {}
        self._kept = 0
        self._marker: weakref.ref[nn.Parameter] | None = None
        self._mark = -1
        self._habit = self._written = False
        self._plan()

    # Finding them.

    def _found(self) -> Iterator[tuple[nn.Module, str, str]]:
        model = self._layers.model
        for prefix, module in model.named_modules() if model is not None else ():
            for name in module._buffers:
                yield module, name, f"{prefix}.{name}" if prefix else name

    def _plan(self) -> None:
        """Group the buffers as they are now; what is known of them from before this step stays known."""
        known: dict[int, Tensor] = {}
        for group in (*self._groups, *self._constant):
            known.update(zip(map(id, group.tensors), group.parts(), strict=True))
        was = dict(zip(((id(d), name) for d, name, _ in self._places), self._objects, strict=True))
        self._places, self._objects, plain = [], [], {}
        for module, name, full in self._found():
            key, one = (id(module._buffers), name), module._buffers[name]
            self._places.append((module._buffers, name, full))
            self._objects.append(one)
            old = was.get(key, one)
            if old is not one:
                self._loose.add(key)
                copy = known[id(old)].view_as(old).clone() if old is not None and id(old) in known else None
                self._now[key] = self._before[key] = (old, copy)
            if key in self._loose or (one is not None and not _is_plain(one)):
                self._loose.add(key)
                self._now.setdefault(key, _held(one))
                self._before.setdefault(key, self._now[key])
            elif one is not None:
                plain[id(one)] = one
                if isinstance(module, nn.modules.batchnorm._NormBase) or self._unread(one):
                    self._changing.add(id(one))
        self._groups = _grouped([one for one in plain.values() if id(one) in self._changing], known)
        self._constant = _grouped([one for one in plain.values() if id(one) not in self._changing], known)
        self._fixed = [(d, name) for d, name, _ in self._places if (id(d), name) not in self._loose]
        self._ids = [id(d[name]) for d, name in self._fixed]
        self._versions = self._count()
        parameter = next((parameter for _, parameter in self._layers.parameters()), None)
        self._marker = weakref.ref(parameter) if parameter is not None else None

    def _unread(self, buffer: Tensor) -> bool:
        """True for one of numbers that cannot be compared without waiting for its device."""
        return buffer.is_floating_point() and not device.reading_is_free(buffer.device)

    def _count(self) -> int:
        return sum(tensor._version for group in self._constant for tensor in group.tensors)

    # Each step.

    def begin(self, *, fresh: bool) -> None:
        """A step is about to be made or left out; ``fresh``: there has been a backward since the last one."""
        if not self._places or not fresh:
            return
        for group in self._groups:
            group.before, group.last = group.last, group.before
        if self._loose:
            self._before = dict(self._now)
        marker = self._marker() if self._marker is not None else None
        self._habit, self._written = (
            self._written,
            marker is not None and marker._version != self._mark and self._mark >= 0,
        )

    def stepped(self) -> None:
        """The step is over: who writes to the parameters from here on is the user."""
        marker = self._marker() if self._marker is not None else None
        self._mark = marker._version if marker is not None else -1

    def made(self, *, fresh: bool) -> None:
        """A step is made: `begin` and `keep`; a model without buffers is only looked at now and then."""
        if self._places:
            self.begin(fresh=fresh)
            self.keep()
            return
        if self._kept % _SELDOM == 0:
            self._look_again()
        self._kept += 1

    def keep(self) -> None:
        """The step is made: take the buffers as they are."""
        if [id(d.get(name)) for d, name in self._fixed] != self._ids:
            self._plan()
        for group in self._groups:
            group.keep()
        for d, name, _ in self._places if self._loose else ():
            if (id(d), name) in self._loose:
                self._now[id(d), name] = _held(d.get(name))
        if self._constant and self._count() != self._versions:
            self._promote()
        self._kept += 1
        if self._kept <= _LOOKED or self._kept % _SELDOM == 0:
            self._look_again()

    def _look_again(self) -> None:
        """Take in buffers that were added; find those that change without being counted."""
        if [full for _, _, full in self._found()] != [full for _, _, full in self._places]:
            self._plan()
        found = {
            id(tensor)
            for group in self._constant
            for tensor, view, part in zip(group.tensors, group.now, group.parts(), strict=True)
            if device.reading_is_free(tensor.device) and not torch.equal(view, part)
        }
        if found:
            self._changing |= found
            self._plan()
            for group in self._groups:
                group.keep()

    def _promote(self) -> None:
        """Copy from now on what was taken for constant and has changed."""
        moved = {
            id(tensor)
            for group in self._constant
            for tensor, view, part in zip(group.tensors, group.now, group.parts(), strict=True)
            if not device.reading_is_free(tensor.device) or not torch.equal(view, part)
        }
        self._versions = self._count()
        if moved:
            self._changing |= moved
            self._plan()

    # A step that is left out.

    def _unknown(self) -> str:
        """Say why what the buffers were before is not known; nothing where it is."""
        if not any(module._buffers for module in self._modules()):
            return ""
        if self._written and not self._habit:
            return "the model was written to since the last step, so that what its buffers were before is not known"
        if any(group.strayed for group in (*self._groups, *self._constant)):
            return "buffers of the model have moved to other memory"
        return ""

    def _modules(self) -> Iterator[nn.Module]:
        model = self._layers.model
        return model.modules() if model is not None else iter(())

    def give_back(self) -> str:
        """Put every buffer back as it was before the forwards of this step; return why that cannot be, or nothing."""
        problem = self._unknown()
        if problem:
            return problem
        known = {(id(d), name) for d, name, _ in self._places}
        for module, name, full in self._found():
            one = module._buffers[name]
            if (id(module._buffers), name) not in known and one is not None and not is_finite(one):
                problem = f"the buffer {full}, which is new, is not finite"
        for (d, name, full), one in zip(self._places, self._objects, strict=True):
            if (id(d), name) in self._loose:
                problem = self._give_back_loose(d, name, full) or problem
            elif d.get(name) is not one:
                d[name] = one
        for group in self._groups:
            group.give_back()
        for group in self._constant:
            problem = self._give_back_constant(group) or problem
        return problem

    def _give_back_loose(self, d: dict[str, Any], name: str, full: str) -> str:
        one, copy = self._before.get((id(d), name), (None, None))
        if one is not None and copy is None:
            return f"what the buffer {full} was before is not known"
        d[name] = one
        if one is not None and copy is not None:
            one.data.copy_(copy)
        self._now[id(d), name] = (one, copy)
        return ""

    def _give_back_constant(self, group: _Group) -> str:
        unseen = self._count() == self._versions
        for view, part in zip(group.now, group.parts(), strict=True):
            if torch.equal(view, part):
                continue
            if unseen and is_finite(view):
                return "a buffer of the model has changed without torch's knowledge"
            view.copy_(part)
        return ""

    def give_back_where(self, bad: Tensor) -> str:
        """Do the same on devices, where ``bad`` (bool, no dimensions); nothing is read. Then `keep` is done too."""
        problem = self._unknown()
        if [id(d.get(name)) for d, name in self._fixed] != self._ids or self._count() != self._versions:
            self._changing |= {id(tensor) for group in self._constant for tensor in group.tensors}
            self._plan()
        groups = [group for group in self._groups if group.last.device.type == bad.device.type]
        if len(groups) < len(self._groups):
            problem = problem or "buffers of the model lie on the CPU, where they cannot be given back without waiting"
        for group in groups:
            if problem:
                group.keep()
            else:
                group.give_back_where(bad)
        for d, name, full in self._places if self._loose else ():
            if (id(d), name) in self._loose:
                problem = self._give_back_loose_where(bad, d, name, full) or problem
        return problem

    def _give_back_loose_where(self, bad: Tensor, d: dict[str, Any], name: str, full: str) -> str:
        now, (_, copy) = d.get(name), self._before.get((id(d), name), (None, None))
        same = (
            now is not None
            and copy is not None
            and (now.shape, now.dtype, now.device) == (copy.shape, copy.dtype, copy.device)
        )
        if same and now is not None and copy is not None:
            now.data.copy_(torch.where(bad.to(now.device, non_blocking=True), copy, now))
        self._now[id(d), name] = _held(now)
        return "" if same or (now is None and copy is None) else f"the buffer {full} is of another kind than before"


def is_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or infinite; reads the tensor."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or is_lazy(tensor):
        return False
    common = tensor.dtype.itemsize > 1 or tensor.dtype in (torch.bool, torch.uint8, torch.int8)  # float8 does not join
    return common and not tensor.is_quantized and tensor.is_contiguous()


def _held(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return tensor, None if tensor is None or is_lazy(tensor) else tensor.detach().clone()


def _grouped(tensors: Sequence[Tensor], known: dict[int, Tensor]) -> list[_Group]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    groups = [_Group(together) for together in kinds.values()]
    for group in groups:
        for tensor, part in zip(group.tensors, group.parts(), strict=True):
            if id(tensor) in known and known[id(tensor)].numel() == part.numel():
                part.copy_(known[id(tensor)])
    return groups
