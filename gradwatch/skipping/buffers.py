"""The model's buffers before the forwards of a step, so that a step that is left out can give them back.

A batch that is not finite goes through the running statistics of normalisation before its gradients are seen. So after each
step that is made, the buffers that change are copied side by side into one tensor: one call for all of a kind. Torch's batch
normalisation changes its buffers without counting the change, and so does writing through ``.data``: what a normalisation
holds, and what was ever seen to differ, is copied each time; the rest when torch counts a change or it was replaced.

Between the copy and the forwards the program may write too, as it does to a moving average or a target network, and nothing
tells whose a change is; nor which of several forwards are the step's (`gradwatch.skipping.forwards`). Those of torch's batch
and spectral normalisation are written by forwards alone; to statistics the program wrote where torch has counted a change.
Other buffers are given back where their module holds numbers that are not finite, and else left as they are, which is said.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from gradwatch import device
from gradwatch.skipping.forwards import Forwards

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.measure.layers import Layers

_LOOKED = 16  # first steps after which every buffer is compared with what it was, and every so many after them
_SELDOM = 64
_WRITTEN_BY_FORWARDS = (nn.modules.batchnorm._NormBase, parametrizations._SpectralNorm)  # and by nobody else


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
        self._groups: list[_Group] = []  # of what forwards alone write
        self._others: list[_Group] = []  # others that change
        self._constant: list[_Group] = []
        self._statistics: list[Tensor] = []  # of normalisations, which torch does not count changes of
        self._counters: list[Tensor] = []  # what each forward writes, and torch counts
        self._forwards = Forwards()
        self._usual = True
        self._uncounted = self._versions_then = 0
        self._versions = 0
        self._loose: set[tuple[int, str]] = set()  # places where the tensor is another one each time, or no plain one
        self._now: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {}
        self._before: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {}
        self._kept = 0
        self._marker: weakref.ref[nn.Parameter] | None = None
        self._mark = -1
        self._habit = self._written = False
        self._plan()
        self._forwards.begin(_versions(self._counters), 0)

    # Finding them.

    def _found(self) -> Iterator[tuple[nn.Module, str, str]]:
        model = self._layers.model
        for prefix, module in model.named_modules() if model is not None else ():
            for name in module._buffers:
                yield module, name, f"{prefix}.{name}" if prefix else name

    def _plan(self) -> None:
        """Group the buffers as they are now; what is known of them from before this step stays known."""
        known: dict[int, Tensor] = {}
        for group in (*self._groups, *self._others, *self._constant):
            known.update(zip(map(id, group.tensors), group.parts(), strict=True))
        was = dict(zip(((id(d), name) for d, name, _ in self._places), self._objects, strict=True))
        self._places, self._objects, self._statistics = [], [], []
        plain: dict[int, Tensor] = {}
        own: set[int] = set()
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
                if isinstance(module, _WRITTEN_BY_FORWARDS):
                    own.add(id(one))
                if isinstance(module, nn.modules.batchnorm._NormBase) and one.is_floating_point():
                    self._statistics.append(one)
                if id(one) in own or self._unread(one):
                    self._changing.add(id(one))
        self._groups = _grouped([one for one in plain.values() if id(one) in own], known)
        self._others = _grouped([one for one in plain.values() if id(one) in self._changing - own], known)
        self._counters = [
            one for one in plain.values() if id(one) in own and id(one) not in set(map(id, self._statistics))
        ]
        self._uncounted = _versions(self._statistics)
        self._constant = _grouped([one for one in plain.values() if id(one) not in self._changing], known)
        self._fixed = [(d, name) for d, name, _ in self._places if (id(d), name) not in self._loose]
        self._ids = [id(d[name]) for d, name in self._fixed]
        self._versions = self._count()
        self._versions_then = _versions(self._tensors_of_others())
        parameter = next((parameter for _, parameter in self._layers.parameters()), None)
        self._marker = weakref.ref(parameter) if parameter is not None else None

    def _unread(self, buffer: Tensor) -> bool:
        """True for one of numbers that cannot be compared without waiting for its device."""
        return buffer.is_floating_point() and not device.reading_is_free(buffer.device)

    def _count(self) -> int:
        return sum(tensor._version for group in self._constant for tensor in group.tensors)

    def _tensors_of_others(self) -> list[Tensor]:
        return [tensor for group in self._others for tensor in group.tensors]

    # Each step.

    def begin(self, optimizer: int, backwards: int, *, fresh: bool) -> None:
        """A step of this optimizer is about to be made or left out.

        ``backwards`` is their number so far; ``fresh``: there has been one since the last step.
        """
        if not self._places or not fresh:
            return
        if self._counters:
            self._usual = self._forwards.took(optimizer, _versions(self._counters), backwards)
        for group in (*self._groups, *self._others):
            group.before, group.last = group.last, group.before
        if self._loose:
            self._before = dict(self._now)
        marker = self._marker() if self._marker is not None else None
        self._habit, self._written = (
            self._written,
            marker is not None and marker._version != self._mark and self._mark >= 0,
        )

    def stepped(self, backwards: int) -> None:
        """The step is over, after so many backwards: who writes to the parameters from here on is the user."""
        if self._counters:
            self._forwards.begin(_versions(self._counters), backwards)
        marker = self._marker() if self._marker is not None else None
        self._mark = marker._version if marker is not None else -1

    def made(self, optimizer: int, backwards: int, *, fresh: bool) -> None:
        """A step is made: `begin` and `keep`; a model without buffers is only looked at now and then."""
        if self._places:
            self.begin(optimizer, backwards, fresh=fresh)
            self.keep()
            return
        if self._kept % _SELDOM == 0:
            self._look_again()
        self._kept += 1

    def keep(self) -> None:
        """The step is made: take the buffers as they are."""
        if [id(d.get(name)) for d, name in self._fixed] != self._ids:
            self._plan()
        for group in (*self._groups, *self._others):
            group.keep()
        for d, name, _ in self._places if self._loose else ():
            if (id(d), name) in self._loose:
                self._now[id(d), name] = _held(d.get(name))
        if self._others:
            self._versions_then = _versions(self._tensors_of_others())
        if self._constant and self._count() != self._versions:
            self._promote()
        self._kept += 1
        if self._kept <= _LOOKED or self._kept % _SELDOM == 0:
            self._look_again()

    def _look_again(self) -> None:
        """Take in buffers that were added; find those that change without being counted."""
        if [full for _, _, full in self._found()] != [full for _, _, full in self._places]:
            self._plan()
        self._uncounted = _versions(self._statistics)
        found = {
            id(tensor)
            for group in self._constant
            for tensor, view, part in zip(group.tensors, group.now, group.parts(), strict=True)
            if device.reading_is_free(tensor.device) and not torch.equal(view, part)
        }
        if found:
            self._changing |= found
            self._plan()
            for group in (*self._groups, *self._others):
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
        if any(group.strayed for group in (*self._groups, *self._others, *self._constant)):
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
        poisoned = set()  # the tables of buffers that hold numbers that are not finite
        for module, name, full in self._found():
            one = module._buffers[name]
            if one is not None and not is_lazy(one) and not is_finite(one):
                poisoned.add(id(module._buffers))
                if (id(module._buffers), name) not in known:
                    problem = f"the buffer {full}, which is new, is not finite"
        doubtful = [*self._others, *self._constant]
        if _versions(self._statistics) != self._uncounted:
            problem = "the program wrote to the running statistics of a normalisation, perhaps since the last step"
            doubtful += self._groups
        elif not self._usual:
            problem = "more or fewer forwards than usual went through running statistics since the last step"
            doubtful += self._groups
        else:
            for group in self._groups:
                group.give_back()
        problem = self._give_back_doubtful(doubtful, poisoned) or problem
        self._uncounted = _versions(self._statistics)
        self.keep()
        return problem

    def _give_back_doubtful(self, groups: Sequence[_Group], poisoned: set[int]) -> str:
        """Give back what poisoned modules hold of these; return why the rest may not be as it was, or nothing."""
        problem, unseen = "", self._count() == self._versions
        constant = {id(tensor) for group in self._constant for tensor in group.tensors}
        parts = {
            id(tensor): (view, part)
            for group in groups
            for tensor, view, part in zip(group.tensors, group.now, group.parts(), strict=True)
        }
        for (d, name, full), one in zip(self._places, self._objects, strict=True):
            if (id(d), name) in self._loose:
                problem = self._give_back_loose(d, name, full, poisoned=id(d) in poisoned) or problem
            elif one is None or id(one) not in parts:  # a normalisation's
                d[name] = one
            else:
                view, part = parts[id(one)]
                if d.get(name) is one and torch.equal(view, part):
                    continue
                if id(d) not in poisoned:
                    problem = _doubt(full)
                elif d.get(name) is one and id(one) in constant and unseen:
                    problem = f"the buffer {full} is not finite, and what it was before is not known"
                else:
                    d[name] = one
                    view.copy_(part)
        return problem

    def _give_back_loose(self, d: dict[str, Any], name: str, full: str, *, poisoned: bool) -> str:
        one, copy = self._before.get((id(d), name), (None, None))
        if d.get(name) is one and (one is None or (copy is not None and _same(one, copy))):
            return ""
        if not poisoned:
            return _doubt(full)
        if one is not None and copy is None:
            return f"what the buffer {full} was before is not known"
        d[name] = one
        if one is not None and copy is not None:
            one.data.copy_(copy)
        return ""

    def give_back_where(self, bad: Tensor) -> str:
        """Do the same on devices, where ``bad`` (bool, no dimensions); nothing is read. Then `keep` is done too."""
        problem = self._unknown()
        doubt = bool(self._loose) or _versions(self._tensors_of_others()) != self._versions_then
        if [id(d.get(name)) for d, name in self._fixed] != self._ids or self._count() != self._versions:
            self._changing |= {id(tensor) for group in self._constant for tensor in group.tensors}
            self._plan()
            doubt = True
        everywhere = [*self._groups, *self._others]
        groups = [group for group in everywhere if group.last.device.type == bad.device.type]
        if len(groups) < len(everywhere):
            problem = problem or "buffers of the model lie on the CPU, where they cannot be given back without waiting"
        others = bad & self._is_poisoned(bad) if doubt else bad
        for group in groups:
            if problem:
                group.keep()
            else:
                group.give_back_where(bad if group in self._groups else others)
        for d, name, full in self._places if self._loose else ():
            if (id(d), name) in self._loose:
                problem = self._give_back_loose_where(others, d, name, full) or problem
        doubt = doubt or not self._usual or _versions(self._statistics) != self._uncounted
        self._uncounted = _versions(self._statistics)
        self._versions_then = _versions(self._tensors_of_others())
        said = "buffers have changed since the last step, by this step's forwards or by the program"
        return problem or (said if doubt else "")

    def _is_poisoned(self, bad: Tensor) -> Tensor:
        """Return whether any buffer that the program may write holds a number that is not finite, without waiting."""
        held = [torch.cat(group.now) for group in self._others]
        held += [one for d, name in self._loose_places() if isinstance(one := d.get(name), Tensor) and not is_lazy(one)]
        found = [~torch.isfinite(one).all() for one in held if one.device == bad.device]
        return torch.stack(found).any() if found else torch.zeros_like(bad)

    def _loose_places(self) -> Iterator[tuple[dict[str, Any], str]]:
        return ((d, name) for d, name, _ in self._places if (id(d), name) in self._loose)

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


def _doubt(full: str) -> str:
    return f"the buffer {full} has changed since the last step, by this step's forwards or by the program: it is left as it is"


def _versions(tensors: Sequence[Tensor]) -> int:
    """Return how often torch has counted a change of any of them."""
    return sum(tensor._version for tensor in tensors)


def _same(one: Tensor, copy: Tensor) -> bool:
    try:
        return torch.equal(one, copy)
    except (RuntimeError, NotImplementedError):  # of a kind that cannot be compared
        return False


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
