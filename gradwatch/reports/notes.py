"""Notes about what gradwatch could not do and which of its parts failed, each reported once."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from gradwatch.errors import words_of
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger("gradwatch")


class Notes:
    """The notes of one run.

    Args:
        strict: whether to raise errors of gradwatch's own parts instead of noting them.

    Attributes:
        all: the notes, in the order in which they were added.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.all: list[str] = []
        self._failed: set[str] = set()
        self._shown = False

    def be_shown(self, *, shown: bool) -> None:
        """Record whether a report shows each new note, so that a warning need not be logged too."""
        self._shown = shown

    def add(self, text: str) -> None:
        """Add a note unless an equal one exists."""
        if text not in self.all:
            self.all.append(text)

    def extend(self, news: Iterable[str]) -> None:
        """Add notes without comparing them with the existing ones, since each names its step."""
        self.all.extend(news)

    def warn(self, text: str) -> None:
        """Add a note, and log it as a warning unless a report shows it."""
        self.add(text)
        if not self._shown:
            _say(logging.WARNING, printable(text))

    def part_failed(self, part: str, error: Exception) -> None:
        """Add a note that a part raised and is switched off, or raise its error if ``strict``."""
        if self.strict:
            raise error
        self.error(f"{part} failed and is switched off", error)

    def error(self, what: str, error: Exception) -> None:
        """Add a note of what failed and log the traceback, once for each ``what``."""
        if what not in self._failed:
            self._failed.add(what)
            self.all.append(f"{what}: {words_of(error)}")
            _say(logging.ERROR, f"{what}; training goes on.", error)


def _say(level: int, text: str, error: Exception | None = None) -> None:
    # a logging handler of the program may raise, for example if standard error is closed
    with contextlib.suppress(Exception):
        _log.log(level, "gradwatch: %s", text, exc_info=error)
