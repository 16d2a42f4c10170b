"""The errors that gradwatch raises on purpose.

::

    GradwatchError
    ├── UsageError (ValueError)              bad input: says what happened, the value, what was expected, what to do
    │   └── RunLogError                      a run log that is damaged, foreign, of another model, or in use
    ├── TrainingUnstableError (RuntimeError) auto-clip stops the run: by its policy, or after all it may do
    ├── ExchangeError (RuntimeError)         another process of a distributed training is gone
    ├── PeerError (RuntimeError)             gradwatch itself failed in another process
    ├── IntegrationError (ImportError)       a framework is missing, too old, or without something that is needed
    └── NonFiniteError (RuntimeError)        find_nonfinite found a number that is not finite; says which operation made it
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.records import Origin


class GradwatchError(Exception):
    """The base class of all errors that gradwatch raises on purpose."""


class UsageError(GradwatchError, ValueError):
    """Raised for input that gradwatch cannot work with. Nothing is left attached then."""


class RunLogError(UsageError):
    """Raised for a run log that cannot be used: damaged, no run log at all, of another model, or written by another process."""


class TrainingUnstableError(GradwatchError, RuntimeError):
    """Raised when auto-clip stops the run: by its policy, or because it has skipped as many steps in a row as it may."""


class ExchangeError(GradwatchError, RuntimeError):
    """Raised when rows cannot be exchanged with the other processes, without which distributed training cannot go on."""


class PeerError(GradwatchError, RuntimeError):
    """Raised inside gradwatch when it failed in another process: rows cannot be exchanged, so it is switched off here too."""


class IntegrationError(GradwatchError, ImportError):
    """Raised when an integration is imported whose framework is missing, too old, or without something that it needs."""


class NonFiniteError(GradwatchError, RuntimeError):
    """Raised by `gradwatch.find_nonfinite` at the first loss, gradient or weight that is not finite.

    Attributes:
        origin: the `gradwatch.Origin`; None if the operation is not known.
    """

    def __init__(self, message: str, origin: Origin | None = None) -> None:
        super().__init__(message)
        self.origin = origin


def words_of(error: BaseException) -> str:
    """Return the class and the message of an error, even if its message cannot be formatted."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as of_its_own:
        return f"{type(error).__name__}, whose message cannot be formatted: {type(of_its_own).__name__}"


def shown(value: object) -> str:
    """Return ``repr(value)`` for an error message, or the name of its class if that is long or fails."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 80 else f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'norm'?"`` if ``word`` is close to a known word, else the list of known words."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(map(repr, known))}."
