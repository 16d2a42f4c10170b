"""The state of a run: running, ended, or cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.runlog.reader import RunLog


def state_of(log: RunLog) -> str:
    """Return the state of the run in words."""
    last = log.sessions[-1]
    if log.is_written:
        return f"running: process {last.pid} on {last.host}"
    return "ended" if last.ended is not None else "cut off: the process ended without closing its log"
