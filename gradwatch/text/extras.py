"""The command that installs an extra of gradwatch, as it works where the user stands."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path


def missing(what: str, library: str, extra: str) -> str:
    """Return the sentences of an error: ``what`` needs a ``library``, which is not installed, and how to install ``extra``."""
    return f"{what} needs {library}, which is not installed. Install it with: {install_command(extra)}"


def install_command(extra: str) -> str:
    """Return the command that installs an extra into the environment of this process.

    In a clone, it installs the extra of the clone. Otherwise it names what the extra consists of, since the index that pip asks
    need not have gradwatch.
    """
    clone = Path(__file__).resolve().parents[2]
    if (clone / "pyproject.toml").is_file():
        folder = "." if clone == Path.cwd().resolve() else str(clone)
        return f'{_pip_install()} -e "{folder}[{extra}]"'
    return " ".join([_pip_install(), *(f'"{one}"' for one in _requirements(extra))])


def _requirements(extra: str) -> list[str]:
    """Return the requirements of an extra; gradwatch with this extra if it is not installed as a package."""
    mark = f"extra == '{extra}'"
    try:
        told = metadata.requires("gradwatch") or []
    except metadata.PackageNotFoundError:
        told = []
    split = [one.replace('"', "'").partition(";") for one in told]
    return [name.strip() for name, _, marker in split if marker.strip() == mark] or [f"gradwatch[{extra}]"]


def _pip_install() -> str:
    """Return the call of pip for this interpreter, which is ``pip`` if that is the one on the path."""
    found, here = shutil.which("pip"), Path(sys.executable)
    if found is not None and Path(found).parent == here.parent:
        return "pip install"
    python = os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here)
    python = f'"{python}"' if " " in python else python
    if importlib.util.find_spec("pip") is None:  # as in an environment that uv has made
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"
