"""The user's names of what an operation meets: modules by path, weights and buffers, and the inputs of a call."""

from __future__ import annotations

import inspect
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.measure.wrappers import local_of, plain_name, unwrapped

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from torch import Tensor, nn

    from gradwatch.records import Subject

_MOST = 256  # tensors among the inputs of a call
OUTPUT = "the output of the model"


class Known(NamedTuple):
    """What is known of a tensor that was made before the operations that are watched."""

    subject: Subject
    name: str
    tensor: Tensor


def storage_of(tensor: Tensor) -> int:
    """Return a number that identifies the memory of a tensor as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


class Names:
    """The names of the modules, weights and buffers of a model, and of the inputs of the calls that are added.

    Args:
        model: the model; None if it is not known, so that a module is named by the outermost module that runs.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._roots: dict[int, dict[int, str]] = {}
        self._known: dict[int, Known] = {}
        self._sizes: set[int] = set()
        self.model = unwrapped(model) if model is not None else None
        if self.model is not None:
            self._modules = {id(one): plain_name(path) for path, one in self.model.named_modules()}
            self.add_state(self.model)

    def add_state(self, model: nn.Module) -> None:
        """Add the weights and buffers of a model."""
        for name, parameter in model.named_parameters():
            self._add("weight", plain_name(name), parameter)
        for name, buffer in model.named_buffers():
            self._add("buffer", plain_name(name), buffer)

    def add_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], computed: Container[str] = ()
    ) -> None:
        """Add the tensors of a call of ``module``; those whose names are in ``computed`` are no batch, but come from weights."""
        for name, tensor in inputs_of(module, args, kwargs):
            self._add("argument" if name in computed or tensor.grad_fn is not None else "input", name, tensor)

    def add_named(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Add tensors that the user has named."""
        for name, tensor in tensors:
            self._add("input", name or "batch", tensor)

    def add_outputs(self, tensors: Iterable[Tensor]) -> None:
        """Add what a model has returned, of whose infinities it is not known here whether they were written on purpose."""
        for tensor in tensors:
            self._add("written", OUTPUT, tensor)

    def has_no_dimension_of(self, batch: int) -> bool:
        """Return whether only the first dimension of inputs has the length of the batch, so that it is known where it is met."""
        return batch > 1 and batch not in self._sizes

    def _add(self, subject: Subject, name: str, tensor: Tensor) -> None:
        self._sizes.update(tensor.shape[subject in ("input", "written") :])
        try:
            self._known.setdefault(storage_of(local_of(tensor.detach())), Known(subject, name, tensor))
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
            return

    def of(self, tensor: Tensor) -> Known | None:
        """Return what is known of a tensor, or of another one with the same memory."""
        return self._known.get(storage_of(tensor))

    def path(self, module: nn.Module, root: nn.Module | None) -> str | None:
        """Return the path of a module in the model, or in ``root`` if no model was given; None if it is not part of it."""
        if self.model is not None:
            return self._modules.get(id(module))
        if root is None:
            return None
        if id(root) not in self._roots:
            self._roots[id(root)] = {id(one): plain_name(path) for path, one in root.named_modules()}
            self.add_state(root)
        return self._roots[id(root)].get(id(module))


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each tensor among the arguments of a call, by the names in its signature."""
    try:
        signature = inspect.signature(module.forward)
        names = [one.name for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        variadic = next((one.name for one in signature.parameters.values() if one.kind is one.VAR_POSITIONAL), None)
    except (TypeError, ValueError):
        names, variadic = [], None
    if variadic in names:
        names = names[: names.index(variadic)]
    named: dict[str, Any] = {}
    for place, value in enumerate(args):
        rest = f"{variadic}[{place - len(names)}]" if variadic else f"argument {place}"
        named[names[place] if place < len(names) else rest] = value
    yield from islice(tensors_in(named | kwargs), _MOST)


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each tensor in lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from tensors_in(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from tensors_in(one, f"{name}[{index}]")
