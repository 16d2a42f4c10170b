"""The layers of a model: its named parameters, held by weak references, each with a column in the history."""

from __future__ import annotations

import re
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from gradwatch.errors import UsageError
from gradwatch.measure.checkpoints import constants_of
from gradwatch.measure.deepspeed import Zero, engine_of, zero_under
from gradwatch.measure.norms import unfit
from gradwatch.measure.parts import Parts
from gradwatch.measure.wrappers import local_of, own_name, plain_name, unwrapped, whole_shapes
from gradwatch.records import Facts
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim import Optimizer

    from gradwatch.records import Family

_RELU = re.compile(r"\b_?relu", re.IGNORECASE)  # a function or a name, and not LeakyReLU or PReLU
_DROPPED = "the program has dropped them"
_NO_OPTIONS = ("params", "param_names", "lr")
_PLAIN = (bool, int, float, str, type(None))
_MOST_TEXTS = 4  # different values of an option
_NAMED = 3  # most layers that a sentence names
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SELF_SCALING = ("adam", "rmsprop", "adagrad", "adadelta", "rprop", "lion", "muon", "adafactor", "lamb")


class Layers:
    """The named parameters of ``model``. Tied parameters are one layer.

    The number of columns never shrinks. A layer keeps its column when its parameter is replaced under the same name, and a
    layer that is added later gets the next column (see `look_again`). Names are those inside DistributedDataParallel and
    `torch.compile`. Parameters whose weights cannot be measured (nested, float8, classes without a norm) have a column, but
    `measured` does not yield them.

    Attributes:
        names, sizes, matrices, fan_in, with_units: per column, the name, the number of elements, whether it has two or more
            dimensions, the inputs of each unit, and whether its rows are units.
        untold: sentences about parameters that cannot be measured, which have not been reported yet.
        constants: by name, whether each buffer was not finite before the run, as bool tensors of shape ().
        zero: DeepSpeed's own optimizer of the model, and what this process holds under it; None if there is none.

    Raises:
        UsageError: the model has no trainable parameter, or a parameter whose shape is not known yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.matrices: list[bool] = []
        self.fan_in: list[int] = []
        self.with_units: list[bool] = []
        self.untold: list[str] = []
        self._unfit: dict[int, str] = {}  # why weights cannot be measured, by column
        self._refs: list[weakref.ref[nn.Parameter]] = []
        self._ends: list[torch.device] = []  # where the first and the last parameter lie
        self._home = torch.device("cpu")
        self._columns: dict[int, int] = {}
        self.zero: Zero | None = None
        self._engine: weakref.ref[nn.Module] | None = None
        self.meet_zero()
        self.look_again()
        self.constants = constants_of(model)
        if not any(parameter.requires_grad for _, parameter in self.parameters()):
            raise UsageError(
                f"{type(model).__name__} has no trainable parameter ({len(self.names)} parameters in all), so there is "
                "no gradient to watch. Call requires_grad_(True) on those that you train, then attach."
            )

    @property
    def model(self) -> nn.Module | None:
        """The model, or None if it no longer exists."""
        return self._model()

    @property
    def home(self) -> torch.device:
        """The device on which the numbers of all layers are gathered: the first that is not the CPU, or else the CPU.

        It is the CPU if DeepSpeed makes the step, since that waits for the norm of the gradients itself.
        """
        ends = [one.device for one in (self._refs[0](), self._refs[-1]()) if one is not None]
        if ends and ends != self._ends:  # the first call, or the model or a part of it has moved
            self._ends = ends
            devices = [parameter.device for _, parameter in self.measured()] if self.zero is None else []
            self._home = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        return self._home

    @property
    def has_strangers(self) -> bool:
        """True if the model has parameters without a column, which were added or replaced; False if that is not known yet."""
        model = self._model()
        if model is None or self.zero is not None:
            return False
        strangers = [one for one in unwrapped(model).parameters() if self.column(one) is None]
        fit = any(one.is_floating_point() or one.is_complex() for one in strangers)
        return fit and not any(isinstance(one, UninitializedParameter) for one in strangers)

    def outlive_model(self) -> Parts | None:
        """Go on with the parts of a model that is gone, and return them; None if one of them is gone as well.

        The model may have been no more than a container or a wrapper, which the program has not kept.
        """
        parts = self._parts
        self._model = lambda: parts if any(True for _ in parts) else None
        return parts if parts.complete else None

    def outlive_part(self) -> Parts | None:
        """Go on with the parts of a model that is gone which still exist, and return them; None if there are none."""
        parts = self._model()
        if not isinstance(parts, Parts):
            return None
        self.untold = [one for one in self.untold if _DROPPED not in one] + [
            f"{', '.join(parts.gone)} of what was attached: watched no further, because {_DROPPED}. Attach again if others have "
            "taken their place, and check that the optimizer holds those."
        ]
        return parts

    def look_again(self) -> set[int]:
        """Update the columns for parameters that were replaced or added, and return these columns.

        Raises:
            UsageError: the shape of a parameter is not known yet.
        """
        model = self._model()
        if model is None:
            return set()
        self._ends = []
        inner = unwrapped(model)
        if not isinstance(inner, Parts):
            self._parts = Parts(model)
        # rows of these weights are units, each of which receives every input
        united = _weights_of(inner, (nn.Linear, _ConvNd))
        # embeddings are lookups of single rows; tied to an output layer they are ordinary matrices
        tables = _weights_of(inner, (nn.Embedding, nn.EmbeddingBag)) - united
        shapes = whole_shapes(inner)
        news = set()
        for wrapped, parameter in inner.named_parameters(remove_duplicate=False):
            name = plain_name(wrapped)
            if isinstance(parameter, UninitializedParameter):
                raise UsageError(
                    f"The shape of parameter {name!r} is not known yet (a lazy module). "
                    "Run one batch through the model, then attach."
                )
            if not parameter.is_floating_point() and not parameter.is_complex():
                continue  # quantised parameters have no gradient
            if self.column(parameter) is None:
                shape = shapes[id(parameter)] if id(parameter) in shapes else _shape_of(parameter)
                column = self._take(name, parameter, shape, with_units=id(parameter) in united)
                if id(parameter) in tables:
                    self.fan_in[column] = 1
                news.add(column)
        self.leave_out()
        return news

    def leave_out(self) -> bool:
        """Find the weights that cannot be measured and leave them out from now on; return True if there are new ones."""
        reasons = {column: reason for column, one in self.parameters() if (reason := unfit(one)) is not None}
        devices = {one.device.type for column, one in self.parameters() if column not in reasons}
        if len(devices) > 1 and "meta" in devices:  # if all are on meta, they are measured as usual
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

    def held(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the part of a weight that this process holds. Call it with autograd disabled."""
        return local_of(parameter) if self.zero is None else self.zero.weight(parameter)

    def meet_zero(self) -> bool:
        """Look for DeepSpeed, which may have been started after the monitor; return whether it has an optimizer of its own."""
        model = self._model()
        engine = engine_of(model) if model is not None else None
        self.zero, self._engine = zero_under(engine), weakref.ref(engine) if engine is not None else None
        self._ends = []
        return self.zero is not None

    def are_stepped_by_engine(self, optimizer: Optimizer) -> bool:
        """Return whether a DeepSpeed engine trains the model and steps this optimizer."""
        engine: Any = self._engine() if self._engine is not None else None
        return engine is not None and engine.optimizer is optimizer

    def have_shapes_of(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer holds parameters of the shapes of all trainable layers, as one of a copy does."""
        mine = sorted(tuple(one.shape) for _, one in self.parameters() if one.requires_grad)
        return mine == sorted(tuple(one.shape) for group in optimizer.param_groups for one in group["params"])

    def take_untold(self) -> list[str]:
        """Return the sentences about what was left out that nobody has asked for yet."""
        untold, self.untold = self.untold, []
        return untold

    def split_units(self, column: int) -> None:
        """Take note that several processes hold parts of one unit of a layer: its units cannot be looked at."""
        self.with_units[column] = False

    def parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the column and the parameter of each layer whose parameter still exists."""
        for column, ref in enumerate(self._refs):
            parameter = ref()
            if parameter is not None:
                yield column, parameter

    @property
    def left_out(self) -> list[str]:
        """The names of layers whose weights cannot be measured."""
        return [self.names[column] for column in sorted(self._unfit)]

    def measured(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the column and the parameter of each layer whose parameter exists and can be measured."""
        return ((column, parameter) for column, parameter in self.parameters() if column not in self._unfit)

    def parameter(self, column: int | None) -> nn.Parameter | None:
        """Return the parameter of a column, or None if it no longer exists."""
        return None if column is None else self._refs[column]()

    def column(self, parameter: torch.Tensor) -> int | None:
        """Return the column of a parameter, or None if it is not watched."""
        column = self._columns.get(id(parameter))
        return column if column is not None and self._refs[column]() is parameter else None


def left_out(layers: Iterable[tuple[str, str]], what: str) -> list[str]:
    """Return one sentence per reason for which ``what`` cannot be measured.

    Args:
        layers: names of layers, each with the reason.
        what: what cannot be measured, such as ``"weights"``.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in layers:
        by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        more = f" and {counted(len(names) - _NAMED, 'more layer')}" if len(names) > _NAMED else ""
        sentences.append(
            f"{what} that cannot be measured are left out: {', '.join(names[:_NAMED])}{more} ({reason}). "
            "All others are watched."
        )
    return sentences


def _shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter; for a nested one, which has none, that of its elements as one vector."""
    return torch.Size([parameter.numel()]) if parameter.is_nested else parameter.shape


def facts_of(model: nn.Module, layers: Layers, clip: str | None) -> Facts:
    """Return the facts about the model that are known before its optimizer is."""
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
        embeds=any("Embedding" in type(m).__name__ for m in modules),
        saturates=any(isinstance(m, (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid)) for m in modules),
        rectified=any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in modules) or bool(_RELU.search(str(model))),
        depth=sum(layers.matrices),
        narrow=any(one.dtype in (torch.float16, torch.bfloat16) for one in model.parameters()),
        clip=clip,
        dropouts=tuple(name for name, m in model.named_modules() if isinstance(m, DROPOUTS) and m.p >= 1),
    )


def family_of(optimizer: Optimizer) -> Family:
    """Return the family of an optimizer, by the names of its classes.

    ``"sgd"`` steps by learning rate times gradient, ``"adam"`` divides gradients by their own size, ``"other"`` is unknown.
    """
    names = " ".join(kind.__name__.lower() for kind in type(optimizer).__mro__)
    if any(word in names for word in _SELF_SCALING):
        return "adam"
    return "sgd" if "sgd" in names else "other"


def options_of(optimizer: Optimizer) -> dict[str, str]:
    """Return the options of an optimizer except its learning rates, as text by name; different ones of its groups together.

    Tensors are left out, since reading one may wait for a device.
    """
    found: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in _NO_OPTIONS and all(isinstance(one, _PLAIN) for one in _parts(value)):
                texts = found.setdefault(str(name), [])
                if str(value) not in texts and len(texts) < _MOST_TEXTS:
                    texts.append(str(value))
    return {name: " / ".join(texts) for name, texts in found.items()}


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _weights_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """Return the ids of the weights of modules of these kinds.

    ``module.weight`` is not accessed: it would compute a parametrised weight, and `spectral_norm` would advance its iteration.
    """
    modules = (module for module in model.modules() if isinstance(module, kinds))
    return {id(one) for module in modules for name, one in module.named_parameters(recurse=False) if name == "weight"}
