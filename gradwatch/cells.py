"""Whether the program runs in a notebook or at a prompt, and the cell that is running."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell of a notebook that is running.

    Attributes:
        key: identity of the cell, which stays the same when the cell is run again; its code where the notebook gives none.
        run: identity of this run of it.
    """

    key: str
    run: str


def ipython() -> Any:
    """Return the running shell of IPython; None if there is none, also where IPython was imported as a library."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None


def is_interactive() -> bool:
    """Return whether this is a notebook or a prompt."""
    return hasattr(sys, "ps1") or ipython() is not None


def is_notebook() -> bool:
    """Return whether this is the kernel of a notebook, whose output may be HTML and may be replaced later.

    A process that was forked from a kernel is none: what it publishes is dropped, while its standard streams are not.
    """
    kernel = getattr(ipython(), "kernel", None)
    here = os.getpid()
    return kernel is not None and getattr(getattr(kernel, "session", None), "pid", here) == here


def called(file: str) -> str:
    """Return the name of a file of code as people know it: "cell In[3]" for a cell, otherwise ``file``."""
    label = getattr(getattr(ipython(), "compile", None), "format_code_name", None)
    try:
        found = label(file) if label is not None else None
        return f"cell {found[1]}" if found and found[0] == "Cell" else file
    except Exception:  # a shell of another kind
        return file


def running_cell() -> Cell | None:
    """Return the cell of a notebook that is running; None outside notebooks and if that is unknown."""
    if not is_notebook():
        return None
    try:
        request = ipython().get_parent()
        key = request.get("metadata", {}).get("cellId") or request["content"]["code"]
        return Cell(str(key), str(request["header"]["msg_id"]))
    except Exception:  # a kernel of another kind, or a click on a widget instead of a cell
        return None
