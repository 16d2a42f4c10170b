"""Builds the stand-in, once for each torch and each state of its source, into a folder that survives the test session."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

SOURCE = Path(__file__).with_name("standin.cpp")
_SECONDS = 240
_WRITTEN_FOR = "2.13"  # other versions of torch may declare other things in their headers


class UnfitError(Exception):
    """The stand-in does not compile with this version of torch, for which it was not written."""


def torch_folder() -> Path:
    """Return where torch is installed; it is not imported for that."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def why_not() -> str:
    """Return why the stand-in cannot be built here, or nothing."""
    if not sys.platform.startswith("linux"):
        return f"the stand-in for a device maps its memory twice as Linux does, and this is {sys.platform}"
    if shutil.which("g++") is None:
        return "the stand-in for a device is compiled by g++, and there is none (apt-get install g++)"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "the stand-in for a device takes CUDA's place in a build of torch for the CPU, and this is one for CUDA"
    return ""


def built() -> Path:
    """Return the library; it is compiled where it was not yet.

    Raises:
        UnfitError: it does not compile with this torch.
    """
    torch = torch_folder()
    state = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradwatch-tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"standin-{state}.so"
    with FileLock(f"{library}.lock", timeout=_SECONDS):
        if not library.exists():
            unfinished = library.with_suffix(".part")
            include = torch / "include"
            command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{include}"]
            command += [f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), "-o", str(unfinished)]
            command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
            if done.returncode and not version("torch").startswith(_WRITTEN_FOR):
                raise UnfitError(f"the stand-in is written for torch {_WRITTEN_FOR}: {done.stderr[:300]}")
            assert done.returncode == 0, done.stderr[:2000]
            unfinished.rename(library)
    return library
