"""Training on a stand-in for CUDA: no step waits, nothing is read too early, and rows and repairs are those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.build import UnfitError, built, why_not
from tests.device.checks import CHECKS

_ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can be built")


def run(group: str) -> subprocess.CompletedProcess[str]:
    """Run a group of checks in a process of its own, in which torch meets the stand-in first."""
    try:
        library = built()
    except UnfitError as reason:
        pytest.skip(str(reason))
    return subprocess.run(
        [sys.executable, "-m", "tests.device.run", str(library), group],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("group", sorted(CHECKS))
def test_what_holds_on_the_cpu_holds_on_a_device(group: str) -> None:
    """Each check of `tests.device.checks` passes, and none of them is left out by a crash."""
    done = run(group)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["name"]: line["error"] for line in lines if line["error"]} == {}
    assert [line["name"] for line in lines] == [check.__name__ for check in CHECKS[group]], done.stderr[-2000:]
    assert done.returncode == 0
