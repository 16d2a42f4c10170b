"""Traces: runs as text files, so that a published or hand-written trace can be replayed without a training.

Each line is one series in the notation of `gradwatch.rules.notation`; ``#`` starts a comment::

    # loss and global gradient norm, as published
    optimizer adam
    rate 6e-5
    loss 2.2x20 2.199 2.220 2.595
    gradient fc1.weight 0.242x20 0.242 0.947 2.39
    weight fc1.weight 30

``gradient`` and ``weight`` lines name their layer. A short series repeats its last value. ``optimizer`` is ``sgd``,
``adam`` or ``other``; ``elements`` is the number of elements of each layer.
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
    """Return True for a text file. A run log is a folder or an SQLite file."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return b"\0" not in file.read(16)
    except OSError:
        return False  # opening it as a run log raises with the reason


def read_trace(path: str | PathLike[str]) -> Case:
    """Return the run that a trace file holds.

    Raises:
        UsageError: the file cannot be read, or it is not a valid trace.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The trace {path} cannot be read as text: {error}.") from error
    return parse_trace(text, str(path))


def parse_trace(text: str, name: str = "trace") -> Case:
    """Return the run that the text of a trace describes; ``name`` is used in error messages.

    Raises:
        UsageError: the text is not a valid trace.
    """
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
        raise UsageError(f"{name} has weights of {stray[0]!r} but no gradients of it.")
    weights = {layer: layers["weight"].get(layer, "1") for layer in layers["gradient"]}
    return Case(name, None, grad=layers["gradient"], weight=weights, **given)


def _take(known: dict[str, str], word: str, text: str) -> None:
    """Add the series of a layer to ``known``."""
    layer, *values = text.split(None, 1) or [""]
    if layer in known:
        raise ValueError(f"the {word} of {layer!r} is given twice.")
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
            raise ValueError(f"a rate of {value} is not valid: expected a finite number of at least 0.")
        return {"rate": float(value)}
    if word == "elements":
        if int(value) < 1:
            raise ValueError(f"a layer of {value} elements is not valid: expected at least 1.")
        return {"size": int(value)}
    if word == "optimizer":
        if value not in _FAMILIES:
            raise ValueError(f"optimizer {value!r} is not one of {', '.join(_FAMILIES)}.")
        return {"family": value}
    raise ValueError(f"{word!r} is not a word of a trace.{did_you_mean(word, _WORDS)}")
