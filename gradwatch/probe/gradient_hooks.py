"""Backward hooks on the parameters: which gradients arrived, in which order, and whether this process's own are finite.

A Python hook costs a microsecond per parameter and backward. So the order is learned on the first backwards, with a hook
on every parameter, and followed again while an incident is open; in between there is none. Which backward reached which
parameters is not asked here: their gradients tell (`gradwatch.probe.backwards`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch import device
from gradwatch.history.columns import widened
from gradwatch.measure.norms import norm_tensor
from gradwatch.measure.wrappers import is_fully_sharded

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from gradwatch.measure.layers import Layers

_LEARNING = 3  # backwards on which the order is learned


class GradientHooks:
    """The post-accumulate hooks of one model.

    Attributes: ``order`` (L,) is each layer's rank in the last backward that was followed, ``L`` for those that did not
    arrive, None before the first; ``arrived`` (L,) is True for layers whose gradient was seen to arrive at least once;
    ``came`` are the columns that have arrived in a backward whose end was not seen yet; ``hookless`` is True where
    parameters bear no hooks, as under FSDP.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._hooks: dict[int, RemovableHandle] = {}
        self.came: list[int] = []
        self._learning = _LEARNING
        self._closely = False
        self._own: list[Tensor] = []
        self._sentinel: RemovableHandle | None = None
        self.hookless = False
        self.order: NDArray[np.intp] | None = None
        self.arrived = np.zeros(len(layers), dtype=bool)

    def __len__(self) -> int:
        """The number of hooks that are in place."""
        return len(self._hooks)

    def start(self) -> None:
        """Put a hook on every trainable parameter, where hooks can be."""
        self.hookless = self._layers.model is not None and is_fully_sharded(self._layers.model)
        if self.hookless:
            return
        for column, parameter in self._layers.parameters():
            if parameter.requires_grad and column not in self._hooks:
                self._hooks[column] = self._hook(column, parameter)

    def stop(self) -> None:
        """Remove every hook, and the empty tables that torch made for them."""
        for handle in (*self._hooks.values(), *filter(None, [self._sentinel])):
            handle.remove()
        self._hooks.clear()
        self.came.clear()
        self._sentinel = None
        for _, parameter in self._layers.parameters():
            if not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as torch has it

    def follow(self, *, closely: bool) -> None:
        """Follow the order on each backward, or no longer."""
        if closely == self._closely:
            return
        self._closely = closely
        if closely:
            self.start()
        elif not self._learning:
            self._rest()

    def failed(self) -> None:
        """A backward raised: what arrived belongs to no step."""
        self.came.clear()

    def end(self) -> None:
        """A backward of the watched model is over: learn from it in which order gradients arrive."""
        if not self.came:
            return
        rank = np.full(len(self._layers), len(self._layers), dtype=np.intp)
        for place, column in enumerate(dict.fromkeys(self.came)):
            rank[column] = place
        self.came.clear()
        self.order = rank
        self.arrived |= rank < len(self._layers)
        self._learning = max(0, self._learning - 1)
        if not self._learning and not self._closely:
            self._rest()

    def grow(self) -> None:
        """Follow the parameters that were added or replaced."""
        self.arrived = widened(self.arrived, len(self._layers), 0)
        if self.order is not None:
            self.order = widened(self.order, len(self._layers), len(self._layers))
        standing = self._sentinel is not None
        self.stop()
        self._learning = _LEARNING
        self.start()
        if standing:
            self.stand_sentinel()

    def stand_sentinel(self) -> None:
        """Look at what this process's own backwards give, before the processes' gradients become one.

        What is not finite in the middle of a backward reaches the parameters that come last: of the first four in the
        model, the smallest is looked at.
        """
        first = [parameter for _, parameter in self._layers.parameters() if parameter.requires_grad][:4]
        if self._sentinel is not None or self.hookless or not first:
            return
        own = self._own

        def look(parameter: Tensor) -> None:
            with suppress(Exception):  # autograd would hand it to the training; without it only that culprit is unknown
                if parameter.grad is not None and not parameter.grad.is_sparse and not device.capturing():
                    own.append(norm_tensor(parameter.grad))

        smallest = min(first, key=torch.Tensor.numel)
        self._sentinel = smallest.register_post_accumulate_grad_hook(look)

    def own_norms(self) -> list[Tensor]:
        """Return the sentinel's norms since it was asked last; scalar tensors, not read."""
        own = list(self._own)
        self._own.clear()
        return own

    def _rest(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _hook(self, column: int, parameter: nn.Parameter) -> RemovableHandle:
        columns = self.came  # no more: a hook that knew this object would keep it alive

        def arrived(_: Tensor) -> None:
            if not device.capturing():
                columns.append(column)

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(arrived)
        return handle
