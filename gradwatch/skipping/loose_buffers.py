"""Buffers that are replaced by other tensors, or that cannot be copied in a group, each with a copy of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from gradwatch import device

if TYPE_CHECKING:
    from torch import Tensor

    Key = tuple[int, str]  # the identity of the module's table of buffers, and the name in it
    Held = tuple[Tensor | None, Tensor | None]  # a buffer and a copy of its values; None: it is not known


class LooseBuffers:
    """The buffers of a model that are looked up by name at each step, instead of being copied with others.

    Its methods take the module's table of buffers, the name of the buffer in it, and its full name in the model.
    """

    def __init__(self) -> None:
        self._now: dict[Key, Held] = {}
        self._before: dict[Key, Held] = {}

    def __len__(self) -> int:
        return len(self._now)

    def __contains__(self, key: Key) -> bool:
        return key in self._now

    def add(self, key: Key, buffer: Tensor | None) -> None:
        """Follow a buffer from now on, unless it is followed already."""
        self._before.setdefault(key, self._now.setdefault(key, _held(buffer)))

    def replaced(self, key: Key, old: Tensor | None, copy: Tensor | None) -> None:
        """Follow a buffer from now on that was ``old`` before this step, with these values if they are known."""
        self._now[key] = self._before[key] = (old, copy)

    def begin(self) -> None:
        """Take the values after the last step as those before the forwards of the current one."""
        if self._now:
            self._before = dict(self._now)

    def keep(self, table: dict[str, Any], name: str) -> None:
        """Copy a buffer as it is."""
        self._now[id(table), name] = _held(table.get(name))

    def give_back(self, table: dict[str, Any], name: str, full: str, *, poisoned: bool) -> str:
        """Restore a buffer whose module is ``poisoned``; return why it may have changed, or ""."""
        one, copy = self._before.get((id(table), name), (None, None))
        if table.get(name) is one and (one is None or (copy is not None and _same(one, copy))):
            return ""
        if not poisoned:
            return doubt_about(full)
        if one is not None and copy is None:
            return f"the earlier value of the buffer {full} is not known"
        table[name] = one
        if one is not None and copy is not None:
            one.data.copy_(copy)
        return ""

    def give_back_where(self, bad: Tensor, table: dict[str, Any], name: str, full: str) -> str:
        """Restore a buffer where ``bad``, a bool tensor of shape (), is True; return why that was not possible, or ""."""
        now, (_, copy) = table.get(name), self._before.get((id(table), name), (None, None))
        same = (
            now is not None
            and copy is not None
            and (now.shape, now.dtype, now.device) == (copy.shape, copy.dtype, copy.device)
        )
        if same and now is not None and copy is not None:
            now.data.copy_(torch.where(device.moved(bad, now.device), copy, now))
        self.keep(table, name)
        return "" if same or (now is None and copy is None) else f"the buffer {full} is of another kind than before"


def doubt_about(full: str) -> str:
    """Return the sentence for a buffer of which nobody knows who changed it."""
    return f"the buffer {full} has changed since the last step, by this step's forwards or by the program: it is left as it is"


def _same(one: Tensor, copy: Tensor) -> bool:
    try:
        return torch.equal(one, copy)
    except (RuntimeError, NotImplementedError):  # tensors of a kind that cannot be compared
        return False


def _held(tensor: Tensor | None) -> Held:
    return tensor, None if tensor is None or is_lazy(tensor) else tensor.detach().clone()
