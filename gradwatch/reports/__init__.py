"""The reports, one per file. A report receives snapshots and, if it asks for them, the numbers of every recorded step.

To add a report, add one file and one line here. Reports are listed by name and not imported, so rich is loaded only on use.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from typing import TYPE_CHECKING, Any, cast

from gradwatch.cells import is_notebook
from gradwatch.reports.base import Report
from gradwatch.reports.streams import is_terminal

if TYPE_CHECKING:
    from gradwatch.reports.live import LiveReport
    from gradwatch.reports.log import LogReport
    from gradwatch.reports.mlflow import MLflow
    from gradwatch.reports.notebook import NotebookReport
    from gradwatch.reports.tensorboard import TensorBoard
    from gradwatch.reports.wandb import WeightsAndBiases

REPORTS = {
    "live": "gradwatch.reports.live:LiveReport",
    "log": "gradwatch.reports.log:LogReport",
    "mlflow": "gradwatch.reports.mlflow:MLflow",
    "notebook": "gradwatch.reports.notebook:NotebookReport",
    "tensorboard": "gradwatch.reports.tensorboard:TensorBoard",
    "wandb": "gradwatch.reports.wandb:WeightsAndBiases",
}


def __getattr__(name: str) -> Any:
    """Import a report class on access, such as `gradwatch.reports.TensorBoard`."""
    for path in REPORTS.values():
        if path.endswith(f":{name}"):
            return pkgutil.resolve_name(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def report_by_name(name: str) -> Report:
    """Return the report of this name. ``"auto"`` is a card in a notebook, the live view in a terminal, log lines elsewhere."""
    if name == "auto":
        drawable = is_terminal(sys.stderr) and os.environ.get("TERM") not in (None, "dumb", "unknown")
        name = "notebook" if is_notebook() else "live" if drawable else "log"
    return cast("Report", pkgutil.resolve_name(REPORTS[name])())


__all__ = [
    "REPORTS",
    "LiveReport",
    "LogReport",
    "MLflow",
    "NotebookReport",
    "Report",
    "TensorBoard",
    "WeightsAndBiases",
    "report_by_name",
]
