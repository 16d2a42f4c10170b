"""The layers of a model: its named parameter tensors, held weakly, each with a column in the history."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from gradwatch.errors import UsageError
from gradwatch.records import Facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

_SELF_SCALING = ("adam", "rmsprop", "adagrad", "adadelta", "rprop", "lion", "muon", "adafactor", "lamb")


class Layers:
    """Named parameters of ``model``. Tied parameters are one layer; their other names stand in ``aliases``.

    Raises:
        UsageError: the model has no trainable parameter, or one whose shape is not known yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self.aliases: dict[str, list[str]] = {}
        self.sizes: list[int] = []
        self.matrices: list[bool] = []
        self.fan_in: list[int] = []
        self.with_units: list[bool] = []
        self._refs: list[weakref.ref[nn.Parameter]] = []
        self._columns: dict[int, int] = {}
        # rows of these weights are units, each fed by every input
        united = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))}
        trainable = False
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if isinstance(parameter, UninitializedParameter):
                raise UsageError(
                    f"The shape of parameter {name!r} is not known yet (a lazy module). "
                    "Run one batch through the model, then attach."
                )
            if not parameter.is_floating_point() and not parameter.is_complex():
                continue  # quantised: it has no gradient
            known = self._columns.get(id(parameter))
            if known is not None:
                self.aliases.setdefault(self.names[known], []).append(name)
                continue
            self._columns[id(parameter)] = len(self.names)
            self.names.append(name)
            self._refs.append(weakref.ref(parameter))
            self.sizes.append(parameter.numel())
            self.matrices.append(parameter.dim() >= 2)
            self.fan_in.append(max(1, parameter.numel() // max(1, len(parameter))) if parameter.dim() >= 2 else 1)
            self.with_units.append(id(parameter) in united)
            trainable |= parameter.requires_grad
        if not trainable:
            raise UsageError(
                f"{type(model).__name__} has no trainable parameter ({len(self.names)} parameters in all), so there is "
                "no gradient to watch. Call requires_grad_(True) on those that you train, then attach."
            )

    def __len__(self) -> int:
        return len(self.names)

    def parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield column and parameter of those still alive."""
        for column, ref in enumerate(self._refs):
            parameter = ref()
            if parameter is not None:
                yield column, parameter

    def parameter(self, column: int | None) -> nn.Parameter | None:
        """Return the parameter of a column, None when it is gone."""
        return None if column is None else self._refs[column]()

    def column(self, parameter: torch.Tensor) -> int | None:
        """Return the column of a watched parameter, None for any other."""
        column = self._columns.get(id(parameter))
        return column if column is not None and self._refs[column]() is parameter else None


def facts_of(model: nn.Module, layers: Layers, clip: str | None) -> Facts:
    """Return what can be told of the model before its optimizer is known."""
    modules = list(model.modules())
    gated = any(isinstance(m, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)) for m in modules)
    return Facts(
        model=type(model).__name__,
        layers=len(layers),
        parameters=sum(layers.sizes),
        recurrent=gated or any(isinstance(m, (nn.RNN, nn.RNNCell)) for m in modules),
        gated=gated,
        normalised=any("Norm" in type(m).__name__ for m in modules),
        depth=sum(layers.matrices),
        clip=clip,
    )


def family_of(optimizer: Optimizer) -> Literal["sgd", "adam", "other"]:
    """Return whether an optimizer steps by rate times gradient, by gradients divided by their own size, or otherwise."""
    names = " ".join(kind.__name__.lower() for kind in type(optimizer).__mro__)
    if any(word in names for word in _SELF_SCALING):
        return "adam"
    return "sgd" if "sgd" in names else "other"


def optimizer_facts(facts: Facts, optimizer: Optimizer) -> Facts:
    """Return ``facts`` with those of the optimizer."""
    return replace(facts, optimizer=type(optimizer).__name__, family=family_of(optimizer))
