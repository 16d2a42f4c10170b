"""Buffers of one device and dtype, with copies of their values before the forwards of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradwatch import device

if TYPE_CHECKING:
    from collections.abc import Sequence


class BufferGroup:
    """Buffers of one device and dtype.

    Attributes:
        tensors: the buffers.
        now: flat views of the buffers.
        last: their values after the last step, concatenated.
        before: their values before the forwards of the current step, concatenated.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        # writing through ``.data`` is not a change for autograd
        self.now = [tensor.data.view(-1) for tensor in tensors]
        self.last = torch.cat(self.now)
        self.before = self.last.clone()
        self._sizes = [view.numel() for view in self.now]

    def begin(self) -> None:
        """Take the values after the last step as those before the forwards of the current one; `keep` follows."""
        self.before, self.last = self.last, self.before

    def keep(self) -> None:
        """Copy the buffers as they are."""
        torch.cat(self.now, out=self.last)

    def parts(self) -> tuple[Tensor, ...]:
        """Return the values before the forwards of the step, a flat view for each buffer."""
        parts: tuple[Tensor, ...] = self.before.split(self._sizes)
        return parts

    def give_back(self) -> None:
        """Restore the values before the forwards of the step."""
        torch._foreach_copy_(self.now, self.parts())
        self.last.copy_(self.before)

    def give_back_where(self, bad: Tensor) -> None:
        """Restore them where ``bad``, a bool tensor of shape (), is True; nothing is read on the host."""
        self.keep()
        chosen = torch.where(device.moved(bad, self.last.device), self.before, self.last)
        self.last.copy_(chosen)
        torch._foreach_copy_(self.now, chosen.split(self._sizes))

    @property
    def strayed(self) -> bool:
        """True if the memory of a buffer has been replaced."""
        return any(one.data_ptr() != view.data_ptr() for one, view in zip(self.tensors, self.now, strict=True))


def grouped(tensors: Sequence[Tensor], known: dict[int, Tensor]) -> list[BufferGroup]:
    """Return groups of these buffers; their copies are the ``known`` ones, by the identity of the buffer, where there are any."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    groups = [BufferGroup(together) for together in kinds.values()]
    for group in groups:
        for tensor, part in zip(group.tensors, group.parts(), strict=True):
            if id(tensor) in known and known[id(tensor)].numel() == part.numel():
                part.copy_(known[id(tensor)])
    return groups


def can_be_grouped(tensor: Tensor) -> bool:
    """Return whether the buffer can be copied together with others of its device and dtype."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or is_lazy(tensor):
        return False
    common = tensor.dtype.itemsize > 1 or tensor.dtype in (torch.bool, torch.uint8, torch.int8)  # float8 does not join
    return common and not tensor.is_quantized and tensor.is_contiguous()
