"""Copies of the model's buffers before the forwards of a step, to restore them if the step is left out.

A batch that is not finite enters the running statistics of normalisation layers before its gradients are seen. Therefore the
buffers that change are copied after each step, in one call for all buffers of one device and dtype. Torch's batch
normalisation changes its buffers without incrementing their version, as does writing through ``.data``. The buffers of
normalisation layers, those that were ever found to differ, and all floating-point buffers on a device are therefore copied
after each step, the others when their version has changed or they were replaced.

Between the copy and the forwards the program may write to buffers too, as to those of a moving average or a target network,
and it is not known who made a change, nor which of several forwards belong to the step (`gradwatch.skipping.forwards`). The
buffers of torch's batch and spectral normalisation are only written by forwards, unless the version of the running statistics
has changed. Other buffers are restored if their module holds values that are not finite; otherwise they are left as they are,
and this is reported.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from gradwatch import device
from gradwatch.skipping.buffer_group import BufferGroup, can_be_grouped, grouped
from gradwatch.skipping.forwards import Forwards
from gradwatch.skipping.loose_buffers import LooseBuffers, doubt_about

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.measure.layers import Layers

_LOOKED = 16  # first steps, after each of which every buffer is compared with its copy
_SELDOM = 64  # steps between comparisons after that
_WRITTEN_BY_FORWARDS = (nn.modules.batchnorm._NormBase, parametrizations._SpectralNorm)  # and by nothing else


class Buffers:
    """Copies of the buffers of one model.

    Call `begin` before each step, then `keep` if it is made, `give_back` if it is left out, or `give_back_where` if that is
    decided on a device, and then `stepped`.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._places: list[tuple[dict[str, Any], str, str]] = []
        self._objects: list[Tensor | None] = []
        self._changing: set[int] = set()
        self._groups: list[BufferGroup] = []  # buffers that only forwards write
        self._others: list[BufferGroup] = []  # other buffers that change
        self._constant: list[BufferGroup] = []
        self._statistics: list[Tensor] = []  # running statistics, whose version forwards do not increment
        self._counters: list[Tensor] = []  # buffers whose version each forward increments
        self._forwards = Forwards()
        self._usual = True
        self._uncounted = self._versions_then = 0
        self._versions = 0
        self._loose = LooseBuffers()
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
        """Group the current buffers, and keep the values that are known from before this step."""
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
                copy = known[id(old)].view_as(old).clone() if old is not None and id(old) in known else None
                self._loose.replaced(key, old, copy)
            if key in self._loose or (one is not None and not can_be_grouped(one)):
                self._loose.add(key, one)
            elif one is not None:
                plain[id(one)] = one
                if isinstance(module, _WRITTEN_BY_FORWARDS):
                    own.add(id(one))
                if isinstance(module, nn.modules.batchnorm._NormBase) and one.is_floating_point():
                    self._statistics.append(one)
                if id(one) in own or self._unread(one):
                    self._changing.add(id(one))
        self._groups = grouped([one for one in plain.values() if id(one) in own], known)
        self._others = grouped([one for one in plain.values() if id(one) in self._changing - own], known)
        self._counters = [
            one for one in plain.values() if id(one) in own and id(one) not in set(map(id, self._statistics))
        ]
        self._uncounted = _versions(self._statistics)
        self._constant = grouped([one for one in plain.values() if id(one) not in self._changing], known)
        fixed = [(d, name) for d, name, _ in self._places if (id(d), name) not in self._loose]
        self._tables, self._names = [d for d, _ in fixed], [name for _, name in fixed]
        self._fixed = [d[name] for d, name in fixed]
        self._versions = self._count()
        self._versions_then = _versions(self._tensors_of_others())
        parameter = next((parameter for _, parameter in self._layers.parameters()), None)
        self._marker = weakref.ref(parameter) if parameter is not None else None

    def _unread(self, buffer: Tensor) -> bool:
        """Return True for a floating-point buffer that cannot be compared without waiting for its device."""
        return buffer.is_floating_point() and not device.reading_is_free(buffer.device)

    def _count(self) -> int:
        return sum([tensor._version for group in self._constant for tensor in group.tensors])

    def _are_replaced(self) -> bool:
        """Return whether another object is in the place of a buffer."""
        return not all(map(is_, map(dict.get, self._tables, self._names), self._fixed))

    def _tensors_of_others(self) -> list[Tensor]:
        return [tensor for group in self._others for tensor in group.tensors]

    def _loose_places(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        return (one for one in self._places if (id(one[0]), one[1]) in self._loose) if self._loose else iter(())

    # Each step.

    def begin(self, optimizer: int, backwards: int, *, fresh: bool) -> None:
        """Prepare for a step, which is made or left out.

        Args:
            optimizer: the identity of the optimizer.
            backwards: number of backwards of the model so far.
            fresh: there was a backward since the last step.
        """
        if not self._places or not fresh:
            return
        if self._counters:
            self._usual = self._forwards.took(optimizer, _versions(self._counters), backwards)
        for group in (*self._groups, *self._others):
            group.begin()
        self._loose.begin()
        marker = self._marker() if self._marker is not None else None
        self._habit, self._written = (
            self._written,
            marker is not None and marker._version != self._mark and self._mark >= 0,
        )

    def stepped(self, backwards: int) -> None:
        """Record that the step has ended, so that later changes of the parameters are known to be the program's."""
        if self._counters:
            self._forwards.begin(_versions(self._counters), backwards)
        marker = self._marker() if self._marker is not None else None
        self._mark = marker._version if marker is not None else -1

    def made(self, optimizer: int, backwards: int, *, fresh: bool) -> None:
        """Call `begin` and `keep` for a step that is made; a model without buffers is only checked every 64 steps."""
        if self._places:
            self.begin(optimizer, backwards, fresh=fresh)
            self.keep()
            return
        if self._kept % _SELDOM == 0:
            self._look_again()
        self._kept += 1

    def keep(self) -> None:
        """Copy the buffers as they are, because the step is made."""
        if self._are_replaced():
            self._plan()
        for group in (*self._groups, *self._others):
            group.keep()
        for d, name, _ in self._loose_places():
            self._loose.keep(d, name)
        if self._others:
            self._versions_then = _versions(self._tensors_of_others())
        if self._constant and self._count() != self._versions:
            self._promote()
        self._kept += 1
        if self._kept <= _LOOKED or self._kept % _SELDOM == 0:
            self._look_again()

    def _look_again(self) -> None:
        """Include buffers that were added, and find those that change without a new version."""
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
        """Move buffers that were assumed to be constant but have changed to those that are copied."""
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
        """Return why the earlier values of the buffers are not known; empty if they are."""
        if not any(module._buffers for module in self._modules()):
            return ""
        if self._written and not self._habit:
            return "the model was written to since the last step, so the earlier values of its buffers are not known"
        if any(group.strayed for group in (*self._groups, *self._others, *self._constant)):
            return "buffers of the model have moved to other memory"
        return ""

    def _modules(self) -> Iterator[nn.Module]:
        model = self._layers.model
        return model.modules() if model is not None else iter(())

    def give_back(self) -> str:
        """Restore every buffer to its value before the forwards of this step; return why that was not possible, or ""."""
        problem = self._unknown()
        if problem:
            return problem
        known = {(id(d), name) for d, name, _ in self._places}
        poisoned = set()  # ids of the buffer tables that hold values that are not finite
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

    def _give_back_doubtful(self, groups: Sequence[BufferGroup], poisoned: set[int]) -> str:
        """Restore the buffers in these groups whose module is poisoned; return why the others may have changed, or ""."""
        problem, unseen = "", self._count() == self._versions
        constant = {id(tensor) for group in self._constant for tensor in group.tensors}
        parts = {
            id(tensor): (view, part)
            for group in groups
            for tensor, view, part in zip(group.tensors, group.now, group.parts(), strict=True)
        }
        for (d, name, full), one in zip(self._places, self._objects, strict=True):
            if (id(d), name) in self._loose:
                problem = self._loose.give_back(d, name, full, poisoned=id(d) in poisoned) or problem
            elif one is None or id(one) not in parts:  # a buffer of a normalisation layer
                d[name] = one
            else:
                view, part = parts[id(one)]
                if d.get(name) is one and torch.equal(view, part):
                    continue
                if id(d) not in poisoned:
                    problem = doubt_about(full)
                elif d.get(name) is one and id(one) in constant and unseen:
                    problem = f"the buffer {full} is not finite, and its earlier value is not known"
                else:
                    d[name] = one
                    view.copy_(part)
        return problem

    def give_back_where(self, bad: Tensor) -> str:
        """Restore the buffers on devices where ``bad``, a bool tensor of shape (), is True, and copy them as `keep` does.

        Nothing is read on the host. Returns why buffers may not have been restored, or "".
        """
        problem = self._unknown()
        doubt = bool(self._loose) or _versions(self._tensors_of_others()) != self._versions_then
        if self._are_replaced() or self._count() != self._versions:
            self._changing |= {id(tensor) for group in self._constant for tensor in group.tensors}
            self._plan()
            doubt = True
        everywhere = [*self._groups, *self._others]
        groups = [group for group in everywhere if group.last.device.type == bad.device.type]
        if len(groups) < len(everywhere):
            problem = problem or "buffers of the model are on the CPU, where they cannot be restored without waiting"
        others = bad & self._is_poisoned(bad) if doubt else bad
        for group in groups:
            if problem:
                group.keep()
            else:
                group.give_back_where(bad if group in self._groups else others)
        for d, name, full in self._loose_places():
            problem = self._loose.give_back_where(others, d, name, full) or problem
        doubt = doubt or not self._usual or _versions(self._statistics) != self._uncounted
        self._uncounted = _versions(self._statistics)
        self._versions_then = _versions(self._tensors_of_others())
        said = "buffers have changed since the last step, by this step's forwards or by the program"
        return problem or (said if doubt else "")

    def _is_poisoned(self, bad: Tensor) -> Tensor:
        """Return whether any buffer that the program may write is not finite, as a bool tensor; nothing is read."""
        held = [torch.cat(group.now) for group in self._others]
        held += [
            one for d, name, _ in self._loose_places() if isinstance(one := d.get(name), Tensor) and not is_lazy(one)
        ]
        found = [device.moved(~torch.isfinite(one).all(), bad.device) for one in held]
        return torch.stack(found).any() if found else torch.zeros_like(bad)


def is_finite(tensor: Tensor) -> bool:
    """Return True if no element is NaN or infinite. Reads the tensor on the host."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _versions(tensors: Sequence[Tensor]) -> int:
    """Return the sum of the versions of these tensors, which changes whenever torch counts a change of one of them."""
    return sum([tensor._version for tensor in tensors])
