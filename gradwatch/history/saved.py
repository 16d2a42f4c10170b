"""Validation of a saved state of a history. The whole state is checked before any of it is used."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from gradwatch.errors import UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.records import Floats

FIRST_LOSSES = 16  # losses of a run from which its reference loss is computed
_LARGEST = 2**62  # counters below it can go on counting in 64 bits
_LARGEST_LOG = math.log(sys.float_info.max)


class Saved(NamedTuple):
    """The checked entries of a state; the last two are states of `gradwatch.history.statistics.Typical`."""

    losses: int
    first_losses: list[float]
    typical_grad: dict[str, Floats]
    typical_weight: dict[str, Floats]


def read_state(state: Any, layers: Sequence[str]) -> Saved:
    """Return the checked entries of a state of a history.

    Args:
        state: what `History.state_dict` returned, possibly loaded from a file.
        layers: names of the watched layers.

    Raises:
        UsageError: an entry is missing, has the wrong type or length, or holds a number that no run produces; or the state
            belongs to other layers.
    """
    path = 'state["history"]'
    kept = entries(state, ("layers", *Saved._fields), path)
    _check_layers(kept["layers"], layers, f'{path}["layers"]')
    first = f'{path}["first_losses"]'
    saved = Saved(
        losses=whole_number(kept["losses"], f'{path}["losses"]'),
        first_losses=[_number(one, first) for one in _items(kept["first_losses"], first)],
        typical_grad=_typical(kept["typical_grad"], len(layers), f'{path}["typical_grad"]'),
        typical_weight=_typical(kept["typical_weight"], len(layers), f'{path}["typical_weight"]'),
    )
    most = min(FIRST_LOSSES, saved.losses)
    if len(saved.first_losses) > most:
        refuse(first, f"{len(saved.first_losses)} losses", f"at most {most}, since {saved.losses} were seen")
    return saved


def entries(state: Any, names: Sequence[str], path: str) -> dict[str, Any]:
    """Return ``state`` if it is a dict with all of ``names`` as keys; otherwise raise `UsageError`."""
    if not isinstance(state, dict):
        refuse(path, shown(state), "a dict with " + ", ".join(sorted(names)))
    missing = sorted(set(names) - state.keys())
    if missing:
        refuse(path, f"a dict without {', '.join(missing)}", "a dict with " + ", ".join(sorted(names)))
    return state


def whole_number(value: Any, path: str) -> int:
    """Return ``value`` as an int if it is a whole number that is not negative; otherwise raise `UsageError`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < _LARGEST:
        refuse(path, shown(value), "a whole number that is not negative")
    return int(value)


def refuse(path: str, found: str, expected: str) -> NoReturn:
    """Raise a `UsageError` that names the invalid entry of a state, its value, and what was expected."""
    raise UsageError(
        f"load_state_dict() found {found} as {path}; expected {expected}. Nothing was restored. Load what "
        "state_dict() of a monitor of the same model returned, or continue without it: the run's baselines are then learned anew."
    )


def _check_layers(saved: Any, watched: Sequence[str], path: str) -> None:
    names = list(_items(saved, path))
    if not all(isinstance(name, str) for name in names):
        refuse(path, shown(saved), "a list of names")
    if names == list(watched):
        return
    pairs = zip(names, watched, strict=False)
    other = next(
        (f"{one!r} where {name!r} is watched" for one, name in pairs if one != name), "the first of them alike"
    )
    raise UsageError(
        f"This state belongs to other layers: {len(names)} saved, {len(watched)} watched, {other}. "
        "Nothing was restored. Load it into a monitor of the same model, or continue without it."
    )


def _typical(state: Any, count: int, path: str) -> dict[str, Floats]:
    """Return the checked state of the typical values of ``count`` layers: finite as soon as a layer has seen a value."""
    kept = entries(state, ("log", "scatter", "seen"), path)
    for name in ("log", "scatter", "seen"):
        if len(_items(kept[name], f'{path}["{name}"]')) != count:
            refuse(f'{path}["{name}"]', f"{len(kept[name])} numbers", f"{count}, one for each layer")
    seen = np.array([whole_number(one, f'{path}["seen"]') for one in kept["seen"]], dtype=np.int64)
    log = [
        _number(one, f'{path}["log"]', -_LARGEST_LOG, _LARGEST_LOG) if times else _missing(one, f'{path}["log"]')
        for one, times in zip(kept["log"], seen.tolist(), strict=True)
    ]
    scatter = [_number(one, f'{path}["scatter"]', 0.0) for one in kept["scatter"]]
    return {"log": np.array(log), "scatter": np.array(scatter), "seen": seen}


def _items(value: Any, path: str) -> Sequence[Any]:
    plain = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if not plain:
        refuse(path, shown(value), "a list")
    items: Sequence[Any] = value
    return items


def _number(value: Any, path: str, least: float = -math.inf, most: float = math.inf) -> float:
    number = _real(value)
    if number is None or not math.isfinite(number) or not least <= number <= most:
        bounds = "" if math.isinf(least) else f" of at least {least:.4g}" if math.isinf(most) else f" up to {most:.4g}"
        refuse(path, shown(value), f"a finite number{bounds}")
    return number


def _missing(value: Any, path: str) -> float:
    """Return NaN if ``value`` is NaN, which stands for a layer without values; otherwise raise `UsageError`."""
    number = _real(value)
    if number is None or not math.isnan(number):
        refuse(path, shown(value), "NaN for a layer of which no value was seen")
    return number


def _real(value: Any) -> float | None:
    """Return ``value`` as a float; None if it is not a real number or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
