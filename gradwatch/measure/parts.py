"""What the program still holds of a model that is gone, such as a list of modules made for `attach` alone."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # what is in them is used without them


class Parts(nn.Module):
    """The children of a model that have parameters or buffers, by their names in it, held weakly.

    The child of a wrapper is the model in it. Lists and dicts count as what they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = weakref.WeakValueDictionary()  # type: ignore[assignment]
        self._parameters = weakref.WeakValueDictionary()  # type: ignore[assignment]
        inner = unwrapped(model)
        is_list = isinstance(inner, _LISTS)
        self._complete = is_list or inner is not model or not _has_own(inner)
        if is_list or inner is model:
            self._add_children("", inner)
        else:
            self._modules[""] = inner
        self._names = [*self._modules, *self._parameters]

    def _add_children(self, prefix: str, module: nn.Module) -> None:
        self._parameters.update({prefix + name: one for name, one in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            if isinstance(child, _LISTS):
                self._add_children(f"{prefix}{name}.", child)
            elif any(map(_has_own, child.modules())):
                self._modules[prefix + name] = child

    def __iter__(self) -> Iterator[nn.Module | nn.Parameter]:
        """Iterate over the parts that exist."""
        yield from self._modules.values()  # type: ignore[misc]
        yield from self._parameters.values()  # type: ignore[misc]

    @property
    def gone(self) -> list[str]:
        """The names of parts that no longer exist."""
        there = {name for kept in (self._modules, self._parameters) for name, _ in kept.items()}
        return [name for name in self._names if name not in there]

    @property
    def complete(self) -> bool:
        """Whether the parts are all that the model had, and exist."""
        return self._complete and bool(self._names) and not self.gone

    def are_in(self, model: nn.Module) -> bool:
        """Return whether all parts that exist are in ``model``."""
        mine = {id(part) for part in (*model.modules(), *model.parameters())}
        return any(True for _ in self) and all(id(part) in mine for part in self)


def _has_own(module: nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])
