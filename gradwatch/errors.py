"""Every error that gradwatch raises on purpose.

::

    GradwatchError
    ├── UsageError (ValueError)              bad input: says what happened, the value, what was expected, what to do
    │   └── RunLogError                      a run log that is damaged, foreign, of another model, or another's
    ├── TrainingUnstableError (RuntimeError) auto-clip has done all it may; the run cannot go on
    ├── ExchangeError (RuntimeError)         another process of a distributed training is gone
    └── PeerError (RuntimeError)             gradwatch itself failed in another process
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class GradwatchError(Exception):
    """The root of gradwatch's errors."""


class UsageError(GradwatchError, ValueError):
    """Input that gradwatch cannot work with. Nothing is left attached when it is raised."""


class RunLogError(UsageError):
    """A run log that cannot be read or written: damaged, no run log at all, of another model, or written by another."""


class TrainingUnstableError(GradwatchError, RuntimeError):
    """Auto-clip skipped as many optimizer steps in a row as it may; going on would not train the model."""


class ExchangeError(GradwatchError, RuntimeError):
    """Rows could not be exchanged with the other processes; a distributed training cannot go on without them either."""


class PeerError(GradwatchError, RuntimeError):
    """Gradwatch failed in another process; so it is switched off in this one too, for no rows can be exchanged."""


def words_of(error: BaseException) -> str:
    """Return kind and text of an error, also of one whose text cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as of_its_own:
        return f"{type(error).__name__}, whose text cannot be made: {type(of_its_own).__name__}"


def shown(value: object) -> str:
    """Return a value as an error shows it: its kind where its text is long or cannot be made."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 80 else f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'norm'?"`` for a near miss, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(map(repr, known))}."
