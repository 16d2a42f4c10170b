"""A real terminal: a child on a pseudo-terminal, its output drawn by an emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyte

# a training of 8 ms a step whose loss explodes for a while; `steps` runs it
EXPLODING = """
import time, torch, gradwatch
from torch import nn
torch.manual_seed(0); torch.set_num_threads(1)
model = nn.Sequential()
model.add_module("first.[red]" .replace(".", "_") + "x" * 120, nn.Linear(8, 16))
model.add_module("relu", nn.ReLU())
model.add_module("last", nn.Linear(16, 1))
x, y = torch.randn(64, 8), torch.randn(64, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
short = True
def steps(n):
    for step in n:
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) * (1e4 if 100 <= step < (104 if short else 160) else 1)).backward()
        optimizer.step()
        time.sleep(0.008)
        yield step
"""


@dataclass
class Session:
    """What a person at the terminal saw. ``screens`` holds the screen at several moments, ``last`` its end."""

    screens: list[list[str]] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    scrolled: list[str] = field(default_factory=list)
    raw: str = ""
    code: int = 0

    @property
    def everything(self) -> str:
        """All lines at the end, those that scrolled away included."""
        return "\n".join([*self.scrolled, *self.last])


def run(script: str, columns: int = 80, rows: int = 24, environment: dict[str, str] | None = None) -> Session:
    """Run a Python script in a terminal of this size."""
    screen = pyte.HistoryScreen(columns, rows, history=10_000)
    stream = pyte.ByteStream(screen)
    session = Session()
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=root,
        env={**clean, "TERM": "xterm-256color", "PYTHONPATH": root, **(environment or {})},
    )
    os.close(child)
    raw = b""
    while True:
        ready, _, _ = select.select([parent], [], [], 120)
        assert ready, "the child wrote nothing for two minutes"
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux says so when the child has closed its end
            break
        if not part:
            break
        raw += part
        stream.feed(part)
        if not select.select([parent], [], [], 0.02)[0]:  # a frame is whole when nothing more is on its way
            session.screens.append(list(screen.display))
    os.close(parent)
    session.code = process.wait(timeout=60)
    session.raw = raw.decode(errors="replace")
    session.last = [line.rstrip() for line in screen.display]
    session.scrolled = ["".join(line[x].data for x in range(columns)).rstrip() for line in screen.history.top]
    return session


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Person:
    """Sits at a terminal: starts a command, types, resizes, and looks at the screen until it shows what is expected."""

    def __init__(
        self, command: list[str], columns: int = 80, rows: int = 24, environment: dict[str, str] | None = None
    ) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._parent, child = pty.openpty()
        self.raw = b""
        self._resize(child, columns, rows)
        self.before: list[object] = termios.tcgetattr(child)
        self.after: list[object] = []
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
        root = str(Path(__file__).parent.parent)
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=root,
            env={**clean, "TERM": "xterm-256color", "PYTHONPATH": root, **(environment or {})},
            start_new_session=True,
            preexec_fn=_own_terminal,  # so that Ctrl-C on it is a signal
        )
        self._child = child

    @staticmethod
    def _resize(terminal: int, columns: int, rows: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def lines(self) -> list[str]:
        """The screen as it is."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def settings(self) -> list[object]:
        """How the terminal treats what is typed."""
        return termios.tcgetattr(self._child)

    def look(self, seconds: float) -> None:
        """Take in what is written meanwhile."""
        until = time.monotonic() + seconds
        while select.select([self._parent], [], [], max(0.0, until - time.monotonic()))[0]:
            try:
                part = os.read(self._parent, 65536)
            except OSError:  # Linux says so when the command has gone and its terminal with it
                return
            self.raw += part
            self._stream.feed(part)

    def until(self, *words: str, seconds: float = 30) -> str:
        """Look until all words are on the screen; return it."""
        deadline = time.monotonic() + seconds
        while not all(word in "\n".join(self.lines) for word in words):
            assert time.monotonic() < deadline, f"never saw {words} but:\n" + "\n".join(self.lines)
            self.look(0.05)
        return "\n".join(self.lines)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._parent, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        """Drag the window's corner."""
        self._screen.resize(rows, columns)
        self._resize(self._child, columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def leave(self) -> int:
        """Wait for the command's end; return its exit code."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self.look(0.05)
        self.look(0.1)
        self.after = self.settings
        os.close(self._parent)
        os.close(self._child)
        return self.process.returncode
