"""The layers of a model: its named parameter tensors, held weakly, each with a column in the history."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from gradwatch.errors import UsageError
from gradwatch.measure.norms import unfit
from gradwatch.measure.wrappers import own_name, plain_name, unwrapped, whole_shapes
from gradwatch.records import Facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer

    from gradwatch.records import Family

_NAMED = 3  # layers that a sentence names
_SELF_SCALING = ("adam", "rmsprop", "adagrad", "adadelta", "rprop", "lion", "muon", "adafactor", "lamb")


class Layers:
    """Named parameters of ``model``. Tied parameters are one layer; their other names stand in ``aliases``.

    Those whose weights cannot be measured (nested, float8, classes that have no norm) are left out of what is looked at
    (`measured`); ``untold`` says so, for whoever reads it next.

    The columns only ever grow: a layer keeps its own when its parameter is replaced under the same name, and one that
    comes later gets the next (`look_again`). Names are those inside DistributedDataParallel and `torch.compile`.

    Raises:
        UsageError: the model has no trainable parameter, or one whose shape is not known yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.names: list[str] = []
        self.aliases: dict[str, list[str]] = {}
        self.sizes: list[int] = []
        self.matrices: list[bool] = []
        self.fan_in: list[int] = []
        self.with_units: list[bool] = []
        self.untold: list[str] = []
        self._unfit: dict[int, str] = {}  # columns whose weights cannot be measured, and why
        self._refs: list[weakref.ref[nn.Parameter]] = []
        self._first_device: torch.device | None = None
        self._home = torch.device("cpu")
        self._columns: dict[int, int] = {}
        self.look_again()
        if not any(parameter.requires_grad for _, parameter in self.parameters()):
            raise UsageError(
                f"{type(model).__name__} has no trainable parameter ({len(self.names)} parameters in all), so there is "
                "no gradient to watch. Call requires_grad_(True) on those that you train, then attach."
            )

    @property
    def model(self) -> nn.Module | None:
        """The model, None when it is gone."""
        return self._model()

    @property
    def home(self) -> torch.device:
        """The device on which the numbers of all layers come together: the first that is not the CPU, if there is any."""
        first = self._refs[0]()
        if first is not None and first.device != self._first_device:  # at first, or the model has moved
            self._first_device = first.device
            devices = [parameter.device for _, parameter in self.measured()]
            self._home = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        return self._home

    def look_again(self) -> set[int]:
        """Follow parameters that were replaced, take in those that were added; return the columns of both."""
        model = self._model()
        if model is None:
            return set()
        self._first_device = None
        inner = unwrapped(model)
        # rows of these weights are units, each fed by every input
        united = _weights_of(inner, (nn.Linear, _ConvNd))
        # a table is looked up, one row at a time; tied to an output it is a matrix as any other
        tables = _weights_of(inner, (nn.Embedding, nn.EmbeddingBag)) - united
        shapes = whole_shapes(inner)
        news = set()
        seen: dict[int, str] = {}
        for wrapped, parameter in inner.named_parameters(remove_duplicate=False):
            name = plain_name(wrapped)
            if isinstance(parameter, UninitializedParameter):
                raise UsageError(
                    f"The shape of parameter {name!r} is not known yet (a lazy module). "
                    "Run one batch through the model, then attach."
                )
            if not parameter.is_floating_point() and not parameter.is_complex():
                continue  # quantised: it has no gradient
            first = seen.setdefault(id(parameter), name)
            if first != name:
                aliases = self.aliases.setdefault(first, [])
                if name not in aliases:
                    aliases.append(name)
            elif self.column(parameter) is None:
                shape = shapes[id(parameter)] if id(parameter) in shapes else _shape_of(parameter)
                column = self._take(name, parameter, shape, with_units=id(parameter) in united)
                if id(parameter) in tables:
                    self.fan_in[column] = 1
                news.add(column)
        self.leave_out()
        return news

    def leave_out(self) -> bool:
        """Leave out the weights that cannot be measured from now on; True when there are more of them than before."""
        reasons = {column: reason for column, one in self.parameters() if (reason := unfit(one)) is not None}
        devices = {one.device.type for column, one in self.parameters() if column not in reasons}
        if len(devices) > 1 and "meta" in devices:  # those beside it have values
            meta = [column for column, one in self.parameters() if one.device.type == "meta"]
            reasons = dict.fromkeys(meta, "on the meta device") | reasons
        more = {column: reason for column, reason in reasons.items() if self._unfit.get(column) != reason}
        self._unfit = reasons
        self.untold += left_out([(self.names[column], reason) for column, reason in more.items()], "weights")
        return bool(more)

    def _take(self, name: str, parameter: nn.Parameter, shape: torch.Size, *, with_units: bool) -> int:
        if name in self.names:
            column = self.names.index(name)
            self._columns = {key: other for key, other in self._columns.items() if other != column}
        else:
            column = len(self.names)
            self.names.append(name)
            self._refs.append(weakref.ref(parameter))
            self.sizes.append(0)
            self.fan_in.append(0)
            self.matrices.append(False)
            self.with_units.append(False)
        self._columns[id(parameter)] = column
        self._refs[column] = weakref.ref(parameter)
        self.sizes[column] = shape.numel()
        self.matrices[column] = len(shape) >= 2 and shape.numel() > 0
        self.fan_in[column] = max(1, shape.numel() // max(1, shape[0])) if len(shape) >= 2 else 1
        self.with_units[column] = with_units and parameter.dim() == len(shape)  # FSDP1 keeps flat pieces
        return column

    def __len__(self) -> int:
        return len(self.names)

    def take_untold(self) -> list[str]:
        """Return the sentences about what was left out that nobody has asked for yet."""
        untold, self.untold = self.untold, []
        return untold

    def split_units(self, column: int) -> None:
        """Take note that several processes hold parts of one unit of a layer: its units cannot be looked at."""
        self.with_units[column] = False

    def parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield column and parameter of those still alive."""
        for column, ref in enumerate(self._refs):
            parameter = ref()
            if parameter is not None:
                yield column, parameter

    @property
    def left_out(self) -> list[str]:
        """The names of layers whose weights cannot be measured."""
        return [self.names[column] for column in sorted(self._unfit)]

    def measured(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield column and parameter of those still alive whose weights can be measured."""
        return ((column, parameter) for column, parameter in self.parameters() if column not in self._unfit)

    def parameter(self, column: int | None) -> nn.Parameter | None:
        """Return the parameter of a column, None when it is gone."""
        return None if column is None else self._refs[column]()

    def column(self, parameter: torch.Tensor) -> int | None:
        """Return the column of a watched parameter, None for any other."""
        column = self._columns.get(id(parameter))
        return column if column is not None and self._refs[column]() is parameter else None


def left_out(layers: Iterable[tuple[str, str]], what: str) -> list[str]:
    """Return a sentence for each reason for which ``what`` of layers, given by name and reason, cannot be measured."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in layers:
        by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more layers" if len(names) > _NAMED else ""
        sentences.append(
            f"{what} that cannot be measured are left out: {', '.join(names[:_NAMED])}{more} ({reason}). "
            "All others are watched."
        )
    return sentences


def _shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape; of a nested one, which has none, its elements in a row."""
    return torch.Size([parameter.numel()]) if parameter.is_nested else parameter.shape


def facts_of(model: nn.Module, layers: Layers, clip: str | None) -> Facts:
    """Return what can be told of the model before its optimizer is known."""
    model = unwrapped(model)
    modules = list(model.modules())
    gated = any(isinstance(m, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)) for m in modules)
    return Facts(
        model=own_name(model),
        layers=len(layers),
        parameters=sum(layers.sizes),
        recurrent=gated or any(isinstance(m, (nn.RNN, nn.RNNCell)) for m in modules),
        gated=gated,
        normalised=any("Norm" in type(m).__name__ for m in modules),
        depth=sum(layers.matrices),
        clip=clip,
    )


def family_of(optimizer: Optimizer) -> Family:
    """Return whether an optimizer steps by rate times gradient, by gradients divided by their own size, or otherwise."""
    names = " ".join(kind.__name__.lower() for kind in type(optimizer).__mro__)
    if any(word in names for word in _SELF_SCALING):
        return "adam"
    return "sgd" if "sgd" in names else "other"


def optimizer_facts(facts: Facts, optimizer: Optimizer) -> Facts:
    """Return ``facts`` with those of the optimizer."""
    return replace(facts, optimizer=type(optimizer).__name__, family=family_of(optimizer))


def _weights_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """Return the identities of the weights of modules of these kinds.

    Not asked for by attribute: a parametrised weight would be computed, and spectral_norm would go on with its iteration.
    """
    modules = (module for module in model.modules() if isinstance(module, kinds))
    return {id(one) for module in modules for name, one in module.named_parameters(recurse=False) if name == "weight"}
