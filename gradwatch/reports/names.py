"""Names of layers as views show them: without what all have in common, and apart from each other when they are shortened."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from rich.cells import cell_len

from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_PARTS = re.compile(r"(?<=[./])")  # torch joins names by points, Keras by slashes
_NUMBERED = re.compile(r"\d+[./]")


class Names:
    """The names of the layers of a run.

    Args:
        layers: full names, as in the history and in the run log.

    Attributes:
        common: beginning that all names share and that is left out, such as ``"module._orig_mod."``; it ends at a separator.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self.common = _common_beginning(layers)

    def short(self, name: str) -> str:
        """Return a name without the beginning that all share."""
        return name.removeprefix(self.common)

    def told(self, text: str) -> str:
        """Return a text with the names of layers and modules in it shortened; code, such as ``model.fc(x)``, stays as it is."""
        if not self.common or self.common not in text:
            return text
        return re.sub(rf"(?<![\w./]){re.escape(self.common)}[^\s,;:()'\"`]+(?![\w(./])", self._told, text)

    def _told(self, found: re.Match[str]) -> str:
        end = "." * found[0].endswith(".")
        name = found[0].removesuffix(".")
        return (self.short(name) if name in self._known else name) + end

    @cached_property
    def _known(self) -> frozenset[str]:
        """The names of layers and of the modules that hold them."""
        known = set(self._layers)
        for name in self._layers:
            known |= {name[: cut.end() - 1] for cut in re.finditer(r"[./]", name)}
        return frozenset(known)

    def __str__(self) -> str:
        return f'names of layers without "{self.common}", with which all begin' if self.common else ""


@lru_cache(maxsize=8)
def names_of(layers: tuple[str, ...]) -> Names:
    """Return the names of the layers of a run."""
    return Names(layers)


@lru_cache(maxsize=8)
def labels_of(layers: tuple[str, ...], width: int) -> tuple[str, ...]:
    """Return a printable label of at most ``width`` cells for each layer; labels of different names differ."""
    names = names_of(layers)
    shown = [printable(names.short(layer)) for layer in layers]
    labels = [shorten(name, width) for name in shown]
    for same in _collisions(labels):
        group = {shown[index] for index in same}
        begin, end = len(_beginning(group)), len(_beginning({name[::-1] for name in group}))
        for index in same:
            labels[index] = _around(shown[index], begin, end, width)
    for same in _collisions(labels):
        for index in same:  # too narrow for what tells them apart: the number of the layer does
            number = f"#{index}"
            labels[index] = shorten(shown[index], max(0, width - len(number))) + number
    return tuple(labels)


def shorten(name: str, width: int) -> str:
    """Return a printable name in at most ``width`` cells, shortened in the middle so that more of the end is kept.

    >>> shorten("blocks.11.mlp.up.weight", 15)
    'bloc….up.weight'
    """
    name = printable(name)
    if cell_len(name) <= width:
        return name
    head = max(0, (width - 1) // 3)
    tail = max(0, width - 1 - head)
    return f"{name[:head]}…{name[len(name) - tail :]}"


def _collisions(labels: Sequence[str]) -> list[list[int]]:
    counts = Counter(labels)
    found = defaultdict(list)
    for index, label in enumerate(labels):
        if counts[label] > 1:
            found[label].append(index)
    return list(found.values())


def _around(name: str, begin: int, end: int, width: int) -> str:
    """Return a name shortened to its end and to the part in which it differs from others: all but their common ends."""
    first = max(name.rfind(".", 0, begin), name.rfind("/", 0, begin)) + 1  # the beginning of that part
    part = name[first : max(first + 1, len(name) - end)]
    room = width - len(part) - 2
    if room < width // 3:
        return shorten(name, width)
    return f"{'…' * (first > 0)}{part}…{name[len(name) - room :]}"


def _beginning(texts: Collection[str]) -> str:
    """Return the characters with which all texts begin."""
    low, high = min(texts), max(texts)
    return low[: next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _common_beginning(layers: Sequence[str]) -> str:
    if not layers:
        return ""
    parts = _PARTS.split(_beginning(layers))[:-1]  # the last part is not whole
    while parts:
        begin = "".join(parts)
        rest = [name[len(begin) :] for name in layers]
        # at least two parts remain of each name; a number stays with the word before it, unless that is a wrapper's
        alone = any("." not in one and "/" not in one for one in rest)
        wrapper = parts[-1] == "module." or parts[-1].startswith("_")
        if not alone and (wrapper or not any(map(_NUMBERED.match, rest))):
            return begin
        parts.pop()
    return ""
