"""Backward hooks on the parameters: which gradients arrived, in which order, and whether this process's own are finite.

A Python hook costs a microsecond per parameter and backward. The order is therefore learned during the first backwards, with
a hook on every parameter, and again while an explosion is open; otherwise there are no such hooks. Which backward reached
which parameters is found without hooks (`gradwatch.probe.backwards`).
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

_LEARNING = 3  # backwards during which the order is learned


class GradientHooks:
    """The post-accumulate hooks of one model.

    Attributes:
        order: rank of each layer in the last backward that was followed, shape (L,); ``L`` for layers whose gradient did not
            arrive. None before the first such backward.
        arrived: True for layers whose gradient was seen to arrive at least once, shape (L,).
        came: columns that have arrived in a backward whose end was not seen yet.
        hookless: True if parameters cannot have hooks, as under FSDP.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._hooks: dict[int, RemovableHandle] = {}
        self.came: list[int] = []
        self._learning = _LEARNING
        self._closely = False
        self._own: list[Tensor] = []
        self._local_hook: RemovableHandle | None = None
        self.hookless = False
        self.order: NDArray[np.intp] | None = None
        self.arrived = np.zeros(len(layers), dtype=bool)

    def __len__(self) -> int:
        """The number of hooks by which the order is followed."""
        return len(self._hooks)

    def start(self) -> None:
        """Register a hook on every trainable parameter, unless the model is sharded by FSDP."""
        self.hookless = self._layers.model is not None and is_fully_sharded(self._layers.model)
        if self.hookless:
            return
        for column, parameter in self._layers.parameters():
            if parameter.requires_grad and column not in self._hooks:
                self._hooks[column] = self._hook(column, parameter)

    def stop(self) -> None:
        """Remove all hooks, and the empty dicts that torch made for them."""
        for handle in (*self._hooks.values(), *filter(None, [self._local_hook])):
            handle.remove()
        self._hooks.clear()
        self.came.clear()
        self._local_hook = None
        for _, parameter in self._layers.parameters():
            if not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as torch has it

    def follow(self, *, closely: bool) -> None:
        """Follow the order in each backward while ``closely``, otherwise only until it is learned."""
        if closely == self._closely:
            return
        self._closely = closely
        if closely:
            self.start()
        elif not self._learning:
            self._rest()

    def failed(self) -> None:
        """Discard what arrived in a backward that raised."""
        self.came.clear()

    def end(self) -> None:
        """Learn the order in which gradients arrive from a backward of the watched model that has ended."""
        if not self.came:
            return
        rank = np.full(len(self._layers), len(self._layers), dtype=np.intp)
        for index, column in enumerate(dict.fromkeys(self.came)):
            rank[column] = index
        self.came.clear()
        self.order = rank
        self.arrived |= rank < len(self._layers)
        self._learning = max(0, self._learning - 1)
        if not self._learning and not self._closely:
            self._rest()

    def look(self) -> None:
        """Look for gradients of layers that had none while the hooks were there, such as those that were frozen then."""
        if self.hookless or self.arrived.all():
            return
        late = [
            column
            for column, parameter in self._layers.parameters()
            if not self.arrived[column] and parameter.grad is not None
        ]
        if late:
            self.arrived = self.arrived.copy()
            self.arrived[late] = True

    def grow(self) -> None:
        """Register hooks anew after parameters were added or replaced."""
        self.arrived = widened(self.arrived, len(self._layers), 0)
        if self.order is not None:
            self.order = widened(self.order, len(self._layers), len(self._layers))
        watching = self._local_hook is not None
        self.stop()
        self._learning = _LEARNING
        self.start()
        if watching:
            self.watch_local_gradients()

    def watch_local_gradients(self) -> None:
        """Measure the gradients of this process's own backwards, before they are averaged over the processes.

        What is not finite in the middle of a backward reaches the parameters that come last in it, so only the smallest of
        the first four of the model is measured.
        """
        first = [parameter for _, parameter in self._layers.parameters() if parameter.requires_grad][:4]
        if self._local_hook is not None or self.hookless or not first:
            return
        own = self._own

        def look(parameter: Tensor) -> None:
            with suppress(Exception):  # autograd would raise it in the training; without it only that cause is unknown
                if parameter.grad is not None and not parameter.grad.is_sparse and not device.capturing():
                    own.append(norm_tensor(parameter.grad))

        smallest = min(first, key=torch.Tensor.numel)
        self._local_hook = smallest.register_post_accumulate_grad_hook(look)

    def own_norms(self) -> list[Tensor]:
        """Return the norms of this process's own gradients since the last call, as scalar tensors that were not read."""
        own = list(self._own)
        self._own.clear()
        return own

    def _rest(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _hook(self, column: int, parameter: nn.Parameter) -> RemovableHandle:
        columns = self.came  # a hook that refers to ``self`` would keep it alive

        def arrived(_: Tensor) -> None:
            if not device.capturing():
                columns.append(column)

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(arrived)
        return handle
