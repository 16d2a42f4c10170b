"""Programs of several processes on gloo, played once for all tests that look at what they saw.

Run as ``python -m tests.torchrun PROCESSES MODULE FOLDER``: the module is imported once, and each of its processes is
forked from there, which saves each of them the import of torch. Those of `tests.scenes` are started by torchrun itself.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
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
PATIENCE = 120


def played(
    factory: pytest.TempPathFactory, processes: int, module: str, *, torchrun: bool = False, patience: int = PATIENCE
) -> list[Any]:
    """Run a module of the tests in several processes, once for all workers of a test run; return what each has seen.

    ``patience`` is the time in seconds after which forked processes are ended.
    """
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder = root / f"{module}-{processes}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "0.json").exists():
            folder.mkdir(exist_ok=True)
            if torchrun:
                _torchrun(processes, folder, module)
            else:
                _forked(processes, folder, module, patience)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _torchrun(processes: int, folder: Path, module: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--redirects", "3", "--log-dir", str(folder / "log"), "-m", module, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    logs = [path.read_text() for path in (folder / "log").rglob("std*.log")]
    assert done.returncode == 0, "\n".join(logs) + done.stderr


def _forked(processes: int, folder: Path, module: str, patience: int) -> None:
    ended = forked(processes, module, str(folder), patience)
    assert [code for code, _ in ended] == [0] * processes, "\n".join(said for _, said in ended)


def forked(processes: int, module: str, argument: str, patience: int = PATIENCE) -> list[tuple[int, str]]:
    """Run a module with an argument in several processes; return how each has ended, and its standard error."""
    command = [sys.executable, "-m", "tests.torchrun", str(processes), module, argument]
    environment = {**ENVIRONMENT, "GRADWATCH_TEST_PATIENCE": str(patience)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [(code, said) for code, said in json.loads(done.stdout)]


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


def main() -> None:
    """Fork the processes and wait for them; print how each has ended, and its standard error."""
    processes, module = int(sys.argv[1]), importlib.import_module(sys.argv[2])
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # torch loads a good part of itself at the first one
    sys.argv[:] = sys.argv[2:]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    errors = [os.memfd_create("errors") for _ in range(processes)]
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ.update(meeting, RANK=str(rank), WORLD_SIZE=str(processes))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors[rank], 2)
            signal.alarm(
                int(os.environ["GRADWATCH_TEST_PATIENCE"])
            )  # a process that hangs is ended, and its test fails
            play(module.see)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [Path(f"/proc/self/fd/{one}").read_text() for one in errors]
    sys.stdout.write(json.dumps(list(zip(ended, said, strict=True))))


if __name__ == "__main__":
    main()
