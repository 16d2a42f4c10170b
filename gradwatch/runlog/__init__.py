"""The run log: one SQLite file per run, which is written during training and can be read at any time."""

from __future__ import annotations

from gradwatch.runlog.reader import RunLog
from gradwatch.runlog.session import Series, Session

__all__ = ["RunLog", "Series", "Session"]
