"""A real terminal: a child on a pseudo-terminal, its output drawn by an emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass, field
from pathlib import Path

import pyte


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
