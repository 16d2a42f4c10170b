"""A real terminal: a child on a pseudo-terminal, its output drawn by an emulator."""

from __future__ import annotations

import fcntl
import json
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

ROOT = str(Path(__file__).parent.parent)

# a training of some 5 ms a step whose loss explodes for a while; `steps` runs it
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
        time.sleep(0.004)
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


def _environment(changes: dict[str, str] | None) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    return {**clean, "TERM": "xterm-256color", "PYTHONPATH": ROOT, **(changes or {})}


# It has imported torch and waits; each script runs in a fork of it, as the main program at a terminal of its own.
_NURSERY = """
import atexit, fcntl, gc, json, os, sys, termios
import torch, gradwatch, gradwatch.reports.live, rich.progress
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # torch loads a good part of itself at the first one
gc.collect()
gc.freeze()
for line in sys.stdin:
    script, terminal, environment = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
for number in range(3):
    os.dup2(os.open(terminal, os.O_RDWR), number)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.environ.clear()
os.environ.update(environment)
sys.stdin = open(0)
encoding = environment.get("PYTHONIOENCODING", "utf-8")
sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding=encoding) for number in (1, 2))
sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
code = 0
try:
    exec(compile(script, "<string>", "exec"))
except SystemExit as end:
    code = end.code or 0
atexit._run_exitfuncs()  # as at the end of the program, of which the rest would take a second to tidy torch up
sys.stdout.flush()
os._exit(code)
"""


class _Forked:
    """A script at a terminal, with the methods of `subprocess.Popen` that are needed here."""

    _nursery: subprocess.Popen[str] | None = None
    _last: _Forked | None = None
    pid: int

    def __init__(self, script: str, terminal: str, environment: dict[str, str]) -> None:
        last = type(self)._last
        if last is not None and last.poll() is None:  # of a test that failed: the next one would wait for its end
            os.kill(last.pid, signal.SIGKILL)
        nursery = type(self)._nursery
        if nursery is None or nursery.poll() is not None:
            nursery = type(self)._nursery = subprocess.Popen(
                [sys.executable, "-c", _NURSERY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=_environment(None),
            )
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        nursery.stdin.write(json.dumps([script, terminal, environment]) + "\n")
        nursery.stdin.flush()
        self._answers = nursery.stdout
        if last is not None and last.returncode is None:
            last.returncode = int(self._answers.readline())
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None
        type(self)._last = self

    def poll(self) -> int | None:
        """See `subprocess.Popen.poll`."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """See `subprocess.Popen.send_signal`."""
        os.kill(self.pid, number)


def run(script: str, columns: int = 80, rows: int = 24, environment: dict[str, str] | None = None) -> Session:
    """Run a Python script in a terminal of this size."""
    screen = pyte.HistoryScreen(columns, rows, history=10_000)
    stream = pyte.ByteStream(screen)
    session = Session()
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = _Forked(script, os.ttyname(child), _environment(environment))
    raw = b""
    while True:
        ready = select.select([parent], [], [], 0.05)[0]
        if not ready and process.poll() is not None:
            break
        if ready:
            raw += (part := os.read(parent, 65536))
            stream.feed(part)
            if not select.select([parent], [], [], 0.02)[0]:  # a frame is whole when nothing more is on its way
                session.screens.append(list(screen.display))
    os.close(parent)
    os.close(child)
    assert process.returncode is not None
    session.code = process.returncode
    session.raw = raw.decode(errors="replace")
    session.last = [line.rstrip() for line in screen.display]
    session.scrolled = ["".join(line[x].data for x in range(columns)).rstrip() for line in screen.history.top]
    return session


class Person:
    """Sits at a terminal: starts a command or a script, types, resizes, looks at the screen until it shows what is expected."""

    def __init__(self, command: list[str] | str, columns: int = 80, rows: int = 24) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._parent, child = pty.openpty()
        self.raw = b""
        self._resize(child, columns, rows)
        self.before: list[object] = termios.tcgetattr(child)
        self.after: list[object] = []
        self._child = child
        self.process: _Forked | subprocess.Popen[bytes]
        if isinstance(command, str):
            self.process = _Forked(command, os.ttyname(child), _environment(None))
            return
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, cwd=ROOT, env=_environment(None), start_new_session=True
        )

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
            part = os.read(self._parent, 65536)
            self.raw += part
            self._stream.feed(part)

    def until(self, *words: str, seconds: float = 90) -> str:
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
        deadline = time.monotonic() + 90
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self.look(0.05)
        self.look(0.1)
        self.after = self.settings
        os.close(self._parent)
        os.close(self._child)
        code = self.process.returncode
        assert code is not None
        return code
