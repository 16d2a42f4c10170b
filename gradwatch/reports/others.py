"""Detection of other programs that draw on the terminal: tqdm bars and live displays of rich."""

from __future__ import annotations

import sys
import threading
from typing import Any

from gradwatch.reports.streams import same_terminal


def bars_of_tqdm() -> bool:
    """Return True while a tqdm bar is shown."""
    tqdm = sys.modules.get("tqdm")
    return bool(tqdm and len(getattr(getattr(tqdm, "tqdm", None), "_instances", ())))


def is_stand_in(stream: Any) -> bool:
    """Return True for the object by which a live display of rich replaces a standard stream."""
    return hasattr(type(stream), "rich_proxied_file")


def another_live(stream: Any) -> bool:
    """Return True while a live display of rich (Progress, Status, Live) is shown on the terminal of ``stream``."""
    rich = sys.modules.get("rich")
    consoles = [getattr(rich, "_console", None)]
    drawn = [
        console for console in consoles if getattr(console, "_live_stack", None) or getattr(console, "_live", None)
    ]
    for thread in threading.enumerate():
        live = getattr(thread, "live", None)
        if type(thread).__module__ == "rich.live" and live is not None:
            drawn.append(live.console)
    return any(same_terminal(console.file, stream) for console in drawn if console is not None)
