"""The run log: a run in one SQLite file, written while it trains and read by whoever looks in."""

from __future__ import annotations

from gradwatch.runlog.reader import RunLog
from gradwatch.runlog.session import Series, Session

__all__ = ["RunLog", "Series", "Session"]
