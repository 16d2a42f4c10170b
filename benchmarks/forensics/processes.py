"""One process of a program of several: ``python -m benchmarks.forensics.processes NAME TOOL FOLDER``, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.forensics.programs import PROGRAMS
from benchmarks.forensics.tools import said


def in_processes(name: str, tool: str, count: int) -> dict[str, Any]:
    """Run a program in several processes; return what the first one that found something said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "benchmarks.forensics.processes", name, tool, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)  # noqa: S603
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    return next((one for one in found if one["found"]), found[0])


def main() -> None:
    """Be one of the processes."""
    name, tool, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    program = next(one for one in PROGRAMS if one.name == name)
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(said(program, tool)))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
