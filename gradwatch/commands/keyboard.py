"""Keys typed in a terminal, one at a time, without Enter and without showing them."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError
from gradwatch.reports.streams import is_terminal

if TYPE_CHECKING:
    from types import TracebackType

_NAMES = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b": "escape",
}


def names_of(typed: str) -> list[str]:
    r"""Return the keys that a terminal sent: letters unchanged, arrows and other special keys by name.

    >>> names_of("j\x1b[Bq")
    ['j', 'down', 'q']
    """
    keys = []
    while typed:
        code = next((code for code in sorted(_NAMES, key=len, reverse=True) if typed.startswith(code)), typed[0])
        keys.append(_NAMES.get(code, code))
        typed = typed[len(code) :]
    return keys


if sys.platform == "win32":
    import msvcrt
    import time

    _SECOND = {"H": "up", "P": "down", "I": "page up", "Q": "page down", "G": "home", "O": "end"}

    class Keys:
        """The keys of the console that this process runs in."""

        def __enter__(self) -> Keys:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self, seconds: float) -> list[str]:
            """Return the keys that are typed, as soon as there is one; empty after ``seconds``."""
            until = time.monotonic() + seconds
            while not msvcrt.kbhit():
                if time.monotonic() > until:
                    return []
                time.sleep(0.02)
            keys = []
            while msvcrt.kbhit():
                key = msvcrt.getwch()
                keys.append(_SECOND.get(msvcrt.getwch(), "") if key in ("\x00", "\xe0") else names_of(key)[0])
            return keys
else:
    import select
    import termios
    import tty

    class Keys:
        """The keys of the terminal on standard input; a context manager, which restores the terminal's mode on exit.

        Raises:
            UsageError: standard input is not a terminal.
        """

        def __enter__(self) -> Keys:
            if not is_terminal(sys.stdin):
                raise UsageError(
                    "gradwatch watch reads keys from a terminal, but standard input is not a terminal. Use gradwatch report."
                )
            self._input = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._input)
            tty.setcbreak(self._input)
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._input, termios.TCSAFLUSH, self._before)

        def wait(self, seconds: float) -> list[str]:
            """Return the keys that are typed, as soon as there is one; empty after ``seconds``. The end of input is "q"."""
            if not select.select([self._input], [], [], seconds)[0]:
                return []
            typed = os.read(self._input, 1024)
            return names_of(typed.decode(errors="replace")) if typed else ["q"]
