"""Programs of several processes on gloo, played once for all tests that look at what they saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def played(factory: pytest.TempPathFactory, processes: int, module: str) -> list[Any]:
    """Run a module of the tests in several processes, once for all workers of a test run; return what each has seen."""
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder = root / f"{module}-{processes}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "0.json").exists():
            folder.mkdir(exist_ok=True)
            _torchrun(processes, folder, module)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _torchrun(processes: int, folder: Path, module: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--redirects", "3", "--log-dir", str(folder / "log"), "-m", module, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    logs = [path.read_text() for path in (folder / "log").rglob("std*.log")]
    assert done.returncode == 0, "\n".join(logs) + done.stderr


def play(see: Callable[[], Any]) -> None:
    """Be one of the processes: leave what ``see`` returns in the folder that the command names."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = json.dumps(see())
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(seen)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an ordinary exit, without gradwatch too (pytorch#190489)
