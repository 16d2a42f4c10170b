"""One way to tell a file. A report sees snapshots and nothing else.

A new report is one new file and one line here. They are named, not imported: rich is loaded only when one is used.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from typing import TYPE_CHECKING, Any, cast

from gradwatch.reports.base import Report
from gradwatch.reports.streams import is_terminal

if TYPE_CHECKING:
    from gradwatch.reports.live import LiveReport
    from gradwatch.reports.log import LogReport
    from gradwatch.reports.mlflow import MLflow
    from gradwatch.reports.tensorboard import TensorBoard
    from gradwatch.reports.wandb import WeightsAndBiases

REPORTS = {
    "live": "gradwatch.reports.live:LiveReport",
    "log": "gradwatch.reports.log:LogReport",
    "mlflow": "gradwatch.reports.mlflow:MLflow",
    "tensorboard": "gradwatch.reports.tensorboard:TensorBoard",
    "wandb": "gradwatch.reports.wandb:WeightsAndBiases",
}


def __getattr__(name: str) -> Any:
    """Give out a report's class: `gradwatch.reports.TensorBoard` and so on."""
    for path in REPORTS.values():
        if path.endswith(f":{name}"):
            return pkgutil.resolve_name(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def report_by_name(name: str) -> Report:
    """Return the report of this name; ``"auto"`` is live in a terminal and log lines elsewhere."""
    if name == "auto":
        drawable = is_terminal(sys.stderr) and os.environ.get("TERM") not in (None, "dumb", "unknown")
        name = "live" if drawable else "log"
    return cast("Report", pkgutil.resolve_name(REPORTS[name])())


__all__ = [
    "REPORTS",
    "LiveReport",
    "LogReport",
    "MLflow",
    "Report",
    "TensorBoard",
    "WeightsAndBiases",
    "report_by_name",
]
