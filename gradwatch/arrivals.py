"""Backward hooks on the parameters: which gradients arrived, in which order, and whether this process's own are finite.

A Python hook costs a microsecond per parameter and backward. So the order is learned on the first backwards, with a hook
on every parameter, and followed again while an incident is open; in between one hook is enough, the marker, on the
parameter whose gradient comes first. It tells that a backward was one of the watched model's.

Where parameters bear no hooks (under FSDP), the gradients themselves tell: one of them is another than before.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch.columns import widened
from gradwatch.measure import norm_tensor
from gradwatch.wrappers import is_fully_sharded, unreduced

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from gradwatch.layers import Layers

_LEARNING = 3  # backwards on which the order is learned


class Arrivals:
    """The post-accumulate hooks of one model.

    Attributes: ``order`` (L,) is each layer's rank in the last backward that was followed, ``L`` for those that did not
    arrive, None before the first; ``arrived`` (L,) is True for layers whose gradient was seen to arrive at least once.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._hooks: dict[int, RemovableHandle] = {}
        self._columns: list[int] = []
        self._thread = [0]  # the one that the first arrival of this backward came on
        self._learning = _LEARNING
        self._closely = False
        self._common: set[int] = set()
        self._misses = 0
        self._signatures: list[Any] | None = None
        self._own: list[Tensor] = []
        self._sentinel: RemovableHandle | None = None
        self.marker: int | None = None
        self.order: NDArray[np.intp] | None = None
        self.arrived = np.zeros(len(layers), dtype=bool)

    def __len__(self) -> int:
        """The number of hooks that are in place."""
        return len(self._hooks)

    def start(self) -> None:
        """Put a hook on every trainable parameter, where hooks can be."""
        if self._layers.model is not None and is_fully_sharded(self._layers.model):
            self._signatures = self._signatures or []
            return
        for column, parameter in self._layers.parameters():
            if parameter.requires_grad and column not in self._hooks:
                self._hooks[column] = self._hook(column, parameter)

    def stop(self) -> None:
        """Remove every hook, and the empty tables that torch made for them."""
        for handle in (*self._hooks.values(), *filter(None, [self._sentinel])):
            handle.remove()
        self._hooks.clear()
        self._sentinel = None
        for _, parameter in self._layers.parameters():
            if not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as torch has it

    def follow(self, *, closely: bool) -> None:
        """Follow the order on each backward, or go back to the marker."""
        if closely == self._closely:
            return
        self._closely = closely
        if closely:
            self.start()
        elif not self._learning:
            self._keep_marker()

    def failed(self) -> None:
        """A backward raised: what arrived belongs to no step."""
        self._columns.clear()

    def end(self, callers: Collection[int] = ()) -> bool:
        """A backward is over; return True if it reached the watched model.

        ``callers`` are the threads that call backward: what arrived on another of them is that one's.
        """
        if self._signatures is not None:
            before, self._signatures = self._signatures, self._signed()
            return self._signatures != before
        if not self._columns or (self._thread[0] != get_ident() and self._thread[0] in callers):
            return False
        self._misses = 0
        if self._learning or self._closely:
            self._learn()
        self._columns.clear()
        return True

    @property
    def pending(self) -> bool:
        """True when gradients arrived in a backward whose end was not seen."""
        return bool(self._columns)

    def missed(self, *, enough: bool) -> None:
        """A backward seems to have passed by the marker: after three, learn the order anew where that is ``enough``."""
        self._misses += 1
        if enough and self._misses >= _LEARNING and not self._learning:
            self._learn_anew()

    def grow(self) -> None:
        """Follow the parameters that were added or replaced."""
        self.arrived = widened(self.arrived, len(self._layers), 0)
        if self.order is not None:
            self.order = widened(self.order, len(self._layers), len(self._layers))
        self.stop()
        self._learn_anew()

    def _learn_anew(self) -> None:
        self._misses, self._learning, self.marker = 0, _LEARNING, None
        self.start()

    @property
    def hookless(self) -> bool:
        """True where parameters bear no hooks."""
        return self._signatures is not None

    def begin(self) -> None:
        """A backward is about to run."""
        if self._signatures is not None:
            self._signatures = self._signed()

    def _signed(self) -> list[Any]:
        gradients = [parameter.grad for _, parameter in self._layers.parameters()] + unreduced(self._layers.model)
        return [None if g is None else (id(g), getattr(g, "_local_tensor", g)._version) for g in gradients]

    def stand_sentinel(self) -> None:
        """Look at what this process's own backwards give, before the processes' gradients become one.

        What is not finite in the middle of a backward reaches the parameters that come last: of the first four in the
        model, the smallest is looked at.
        """
        first = [parameter for _, parameter in self._layers.parameters() if parameter.requires_grad][:4]
        if self._sentinel is not None or self._signatures is not None or not first:
            return
        own = self._own

        def look(parameter: Tensor) -> None:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                own.append(norm_tensor(parameter.grad))

        smallest = min(first, key=torch.Tensor.numel)
        self._sentinel = smallest.register_post_accumulate_grad_hook(look)

    def own_norms(self) -> list[Tensor]:
        """Return the sentinel's norms since it was asked last; scalar tensors, not read."""
        own = list(self._own)
        self._own.clear()
        return own

    def _learn(self) -> None:
        rank = np.full(len(self._layers), len(self._layers), dtype=np.intp)
        order = list(dict.fromkeys(self._columns))
        for place, column in enumerate(order):
            rank[column] = place
        self.order = rank
        self.arrived |= rank < len(self._layers)
        if not self._learning:
            return
        # the marker is the first of those that arrived each time: parts of a model that take turns must not be it
        self._common = set(order) if self.marker is None else self._common & set(order)
        self.marker = next((column for column in order if column in self._common), order[0])
        self._learning -= 1
        if not self._learning and not self._closely:
            self._keep_marker()

    def _keep_marker(self) -> None:
        for column in [column for column in self._hooks if column != self.marker]:
            self._hooks.pop(column).remove()

    def _hook(self, column: int, parameter: nn.Parameter) -> RemovableHandle:
        columns, thread = self._columns, self._thread  # no more: a hook that knew this object would keep it alive

        def arrived(_: Tensor) -> None:
            if not columns:
                thread[0] = get_ident()
            columns.append(column)

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(arrived)
        return handle
