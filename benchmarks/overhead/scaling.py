"""How the cost of watching grows: with layers, with parameters, and with the steps that were made before."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.overhead.bench import Bench, Watched
from benchmarks.overhead.pages import write_scaling

if TYPE_CHECKING:
    from rich.console import Console

_LAYERS = (10, 30, 100, 300, 1000, 3000)
_WIDTHS = {10**5: 158, 10**6: 500, 10**7: 1581, 10**8: 5000}
_STEPS = (1_000, 10_000, 100_000, 1_000_000)


def _sum(width: int, layers: int) -> Any:
    """A model whose gradients cost next to nothing: the loss is the sum of its parameters."""
    model = nn.ParameterList([nn.Parameter(torch.randn(width, width)) for _ in range(layers)])

    def loss() -> torch.Tensor:
        return torch.stack([parameter.mean() for parameter in model]).sum()

    return model, loss


def _own(bench: Bench, count: int) -> tuple[float, float]:
    """Return the own microseconds of a step, armed, and those of `clip_grad_norm_`."""
    watched = Watched(bench, clip="norm")
    with watched.switched_on():
        spent = watched.probe.seconds
        bench.steps(count)
        own = (watched.probe.seconds - spent) / count
    bench.before_step, bench.clip_seconds = bench.clip, 0.0
    bench.steps(count)
    bench.before_step = None
    watched.on()
    watched.monitor.detach()
    return 1e6 * own, 1e6 * bench.clip_seconds / count


def _by_steps(console: Console) -> list[tuple[int, float, float]]:
    """Return own microseconds of a step after so many steps, and megabytes of the process at most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(8, 4)

    def make() -> Any:
        return model, lambda: (model(x) - torch.randn(8, 1)).square().mean()

    bench = Bench(make, fused=False)
    watched, made, found = Watched(bench, clip="norm"), 0, []
    watched.on()
    with console.status("steps"):
        for goal in _STEPS:
            bench.steps(goal - made - 640)
            blocks = []
            for _ in range(10):
                spent = watched.probe.seconds
                bench.steps(64)
                blocks.append((watched.probe.seconds - spent) / 64)
            made = goal
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
            found.append((goal, 1e6 * statistics.median(blocks), peak))
    watched.monitor.detach()
    return found


def main(console: Console, *, write: bool) -> None:
    """Run all three and print them."""
    tables = {}
    for title, models in (
        ("layers, of 32 x 32", [(layers, (32, layers)) for layers in _LAYERS]),
        ("parameters, in 4 layers", [(size, (width, 4)) for size, width in _WIDTHS.items()]),
    ):
        rows = []
        for size, (width, layers) in models:
            count = 64 if width < 2000 else 8
            own, clip = _own(Bench(functools.partial(_sum, width, layers), fused=False), count)
            rows.append((f"{size:,}", f"{own:.0f} us", f"{own / clip:.2f}"))
        tables[title] = (("own", "own / clip's own"), rows)
    tables["steps done, 4 tensors"] = (
        ("own", "process at most"),
        [(f"{steps:,}", f"{own:.0f} us", f"{peak:.0f} MB") for steps, own, peak in _by_steps(console)],
    )
    for title, (columns, rows) in tables.items():
        table = Table(title=title, title_justify="left")
        for column in (title.split(",")[0], *columns):
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if write:
        write_scaling(tables)
