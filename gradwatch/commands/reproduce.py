"""`gradwatch reproduce`: the lines that load the batch of a step that failed, and run it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gradwatch.commands.values import a_path
from gradwatch.errors import UsageError
from gradwatch.runlog import RunLog

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rich.console import Console

NAME = "reproduce"
HELP = "print the lines that load and run the batch of a step that failed"
EXAMPLES = """\
  gradwatch reproduce runs/today               of the last step that was kept by attach(log=..., save_batch=True)
  gradwatch reproduce runs/today --step 812"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today")
    parser.add_argument("--step", type=int, help="the step; the last one that was kept if it is left out")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the lines; return the exit code."""
    from gradwatch.reports.line import Line

    with RunLog(options.run_log) as log:
        path, step = _kept(log.folder, options.step)
        found = [str(one.origin) for one in log.incidents if one.origin is not None and one.origin.step == step]
    for line in lines_of(path, step, found, _part_in(path)):
        console.print(Line(line), soft_wrap=True)
    return 0


def _kept(folder: Path, step: int | None) -> tuple[Path, int]:
    """Return the file of a step, and the step."""
    steps = [
        int(match[1]) for one in folder.glob("batch-*.pt") if (match := re.fullmatch(r"batch-(\d+)\.pt", one.name))
    ]
    if not steps:
        raise UsageError(
            f"{folder} keeps no batch; expected batch-STEP.pt, as attach(log=..., save_batch=True) writes it."
        )
    step = max(steps) if step is None else step
    if step not in steps:
        raise UsageError(
            f"{folder} keeps no batch of step {step}; it keeps those of {', '.join(map(str, sorted(steps)))}."
        )
    return folder / f"batch-{step}.pt", step


def _part_in(path: Path) -> str:
    """Return the path of the part of the model that was called; empty if it was the model."""
    import torch

    return str(torch.load(path, weights_only=True).get("module", ""))


def lines_of(path: Path, step: int, found: list[str], part: str = "") -> list[str]:
    """Return the lines of the program."""
    called = f"model.get_submodule({part!r})" if part else "model"
    return [
        f"# step {step}" + "".join(f": {one}" for one in found[:1]),
        "import torch",
        "import gradwatch",
        f"kept = torch.load({str(path)!r}, weights_only=True)",
        f"model = ...  # build it, and load the weights of step {step}",
        "with gradwatch.find_nonfinite(model):",
        '    torch.set_rng_state(kept["generator"])',
        f'    out = {called}(*kept["args"], **kept["kwargs"])',
        "    loss = ...  # of out, as in the training",
        "    loss.backward()",
    ]
