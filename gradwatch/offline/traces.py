"""A written run as a text file, so that a published trace or one written by hand can be replayed without a training.

One line for each series, in the notation of `gradwatch.rules.notation`; `#` begins a comment::

    # loss and global gradient norm, as published
    optimizer adam
    rate 6e-5
    loss 2.2x20 2.199 2.220 2.595
    gradient fc1.weight 0.242x20 0.242 0.947 2.39
    weight fc1.weight 30

``gradient`` and ``weight`` lines name their layer; a short series repeats its last value. ``optimizer`` is ``sgd``,
``adam`` or ``other``, ``elements`` the size of each layer.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.errors import UsageError, did_you_mean
from gradwatch.rules.notation import Case, series

if TYPE_CHECKING:
    from os import PathLike

_FAMILIES = ("sgd", "adam", "other")
_MOST_ROWS = 10_000_000
_WORDS = ("loss", "gradient", "weight", "optimizer", "rate", "elements")


def is_trace(path: Path) -> bool:
    """True for a text file; a run log is a folder, or a file of SQLite."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return b"\0" not in file.read(16)
    except OSError:
        return False  # whoever opens it as a run log says why it cannot be read


def read_trace(path: str | PathLike[str]) -> Case:
    """Return the run that a trace file holds.

    Raises:
        UsageError: the file cannot be read, or a line of it is no line of a trace.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The trace {path} cannot be read as text: {error}.") from error
    return parse_trace(text, str(path))


def parse_trace(text: str, name: str = "trace") -> Case:
    """Return the run that the text of a trace describes; ``name`` stands in errors."""
    layers: dict[str, dict[str, str]] = {"gradient": {}, "weight": {}}
    given: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        word, *rest = line.partition("#")[0].split(None, 1) or [""]
        if not word:
            continue
        try:
            if word in layers:
                _take(layers[word], word, "".join(rest))
            else:
                given |= _setting(word, "".join(rest).strip())
        except ValueError as error:
            raise UsageError(f"{name}, line {number}: {error}") from error
    if not layers["gradient"]:
        raise UsageError(f"{name} has no line such as 'gradient fc1.weight 0.1x20 50': there is nothing to replay.")
    stray = sorted(set(layers["weight"]) - set(layers["gradient"]))
    if stray:
        raise UsageError(f"{name} has weights of {stray[0]!r} and no gradients of it.")
    weights = {layer: layers["weight"].get(layer, "1") for layer in layers["gradient"]}
    return Case(name, None, grad=layers["gradient"], weight=weights, **given)


def _take(known: dict[str, str], word: str, text: str) -> None:
    """Add a layer's series."""
    layer, *values = text.split(None, 1) or [""]
    if layer in known:
        raise ValueError(f"the {word} of {layer!r} stands there twice.")
    known[layer] = _series("".join(values))


def _series(text: str) -> str:
    long = sum(int(count) for count in re.findall(r"x(\d{1,18})", text))
    if long > _MOST_ROWS or re.search(r"x\d{19}", text):
        raise ValueError(f"a series of more than {_MOST_ROWS:,} values is longer than any that can be replayed.")
    if not series(text):
        raise ValueError("a series of at least one value is missing.")
    return text


def _setting(word: str, value: str) -> dict[str, Any]:
    if word == "loss":
        return {"loss": _series(value)}
    if word == "rate":
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"a rate of {value} is none: expected a number of at least 0.")
        return {"rate": float(value)}
    if word == "elements":
        if int(value) < 1:
            raise ValueError(f"a layer of {value} elements is none: expected 1 at least.")
        return {"size": int(value)}
    if word == "optimizer":
        if value not in _FAMILIES:
            raise ValueError(f"optimizer {value!r} is not one of {', '.join(_FAMILIES)}.")
        return {"family": value}
    raise ValueError(f"{word!r} is no word of a trace.{did_you_mean(word, _WORDS)}")
