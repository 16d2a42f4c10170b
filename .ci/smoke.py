"""Use an installed gradwatch as a stranger would: every module is there, it watches a training, and its commands answer."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import gradwatch
from gradwatch.errors import IntegrationError

HERE = Path(gradwatch.__file__).parent


def command(*arguments: str) -> str:
    """Run the command of the installed package and return what it prints."""
    program = Path(sys.executable).with_name("gradwatch")
    return subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Do so; an assertion names what is missing."""
    assert "site-packages" in HERE.parts, f"{HERE} is not an installed package"
    assert gradwatch.__version__ == version("gradwatch")
    assert (HERE / "py.typed").exists(), "type checkers would ignore the package's types"
    for module in pkgutil.walk_packages([str(HERE)], "gradwatch."):
        if not module.name.endswith("__main__"):
            needs_a_framework = module.name.startswith("gradwatch.integrations.")
            with suppress(IntegrationError) if needs_a_framework else nullcontext():
                importlib.import_module(module.name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run"
        with gradwatch.attach(model, clip="norm", log=log, report=None) as monitor:
            for step in range(40):
                optimizer.zero_grad()
                scale = float("nan") if step == 30 else 1.0
                (scale * nn.functional.mse_loss(model(x), y)).backward()
                optimizer.step()
        assert [incident.kind for incident in monitor.incidents] == ["nonfinite"], monitor.incidents
        assert all(parameter.isfinite().all() for parameter in model.parameters()), "the step was not left out"
        page = Path(folder) / "page.html"
        command("report", str(log), "--html", str(page))
        assert "nonfinite" in page.read_text(encoding="utf-8")
        assert "nonfinite" in command("report", str(log))
    assert "GW301" in command("rules")
    assert "typical gradient norm" in " ".join(command("explain", "GW301").split())


if __name__ == "__main__":
    main()
