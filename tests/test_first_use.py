"""A new user's first evening: train with a log, look in, kill the training, read what remained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.browser import needs_browser, page
from tests.terminal import Person
from tests.test_watch import step_of

ROOT = Path(__file__).parent.parent


@needs_browser
def test_a_run_can_be_looked_at_while_it_trains_and_after_it_was_killed(tmp_path: Path) -> None:
    """In a real terminal beside the regression example, then in a real browser."""
    run = tmp_path / "runs" / "regression"
    command = [sys.executable, "examples/regression_mlp.py", "--log", str(run), "--epochs", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        person = Person([sys.executable, "-m", "gradwatch", "watch", str(run)], columns=100, rows=30)
        first = step_of(person.until("step", "output.weight", f"running: process {training.pid}", seconds=60))
        while step_of("\n".join(person.lines)) < first + 200:
            person.look(0.1)
        person.type("i")
        person.until("incident 1 of", "prime suspect output.weight")
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    person.until("cut off")
    person.type("q")
    assert person.leave() == 0
    command = [sys.executable, "-m", "gradwatch", "report", str(run), "--html", str(tmp_path / "page.html"), "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cut off: the process ended without closing its log" in done.stdout
    with page(tmp_path / "page.html") as driver:
        text = " ".join(str(driver.execute_script("return document.body.innerText")).split())
        assert "prime suspect output.weight" in text
        assert "What to do" in text
        assert "cut off" in text
        assert len(driver.find_elements("css selector", ".hm image")) >= 1
