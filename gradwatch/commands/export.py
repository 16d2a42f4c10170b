"""`gradwatch export`: writes the numbers of a run in a format that other programs read."""

from __future__ import annotations

import csv
import io
import shutil
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gradwatch.commands.outputs import Output, check_outputs, write_outputs
from gradwatch.commands.values import a_path
from gradwatch.errors import UsageError
from gradwatch.records import Scalars
from gradwatch.runlog import RunLog
from gradwatch.runlog.own import beginning_of
from gradwatch.runlog.plain import to_json
from gradwatch.text.extras import missing
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

Table: TypeAlias = "list[tuple[str, Any]]"  # columns: name and values

NAME = "export"
HELP = "write the numbers of a run as CSV, Parquet or TensorBoard files"
EXAMPLES = """\
  gradwatch export runs/today --to csv                        runs/today/csv/steps.csv and so on
  gradwatch export runs/today --to parquet --out numbers      needs the extra export
  gradwatch export runs/today --to tensorboard --out tb       needs the extra tensorboard

csv and parquet: steps (one row per step), gradient_norms and weight_norms (one column per layer, only rows that have
norms), incidents. tensorboard: scalars of at most 10,000 rows and norms of at most 1,000, evenly spaced, incidents as text.
An earlier export is replaced. A file of another program is replaced only with --overwrite."""
_MARK = "gradwatch"  # key in the metadata of a Parquet file
_MOST_STEPS, _MOST_LAYER_STEPS = 10_000, 1_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today")
    parser.add_argument("--to", required=True, choices=("csv", "parquet", "tensorboard"), help="the format")
    parser.add_argument("--out", metavar="DIR", type=a_path, help="the folder to write to (default: a folder in RUN)")
    parser.add_argument("--overwrite", action="store_true", help="also replace files that gradwatch did not write")


def run(options: argparse.Namespace, console: Console) -> int:
    """Export a run log; return the exit code."""
    with RunLog(options.run_log) as log:
        folder = options.out or log.folder / options.to
        outputs = {"csv": _csv, "parquet": _parquet, "tensorboard": _tensorboard}[options.to](log, folder)
        check_outputs(log, outputs, "--out", overwrite=options.overwrite)
        write_outputs(outputs, "--out")
    from gradwatch.reports.line import Line

    console.print(Line(f"written: {folder}"))
    return 0


def tables(log: RunLog) -> dict[str, Table]:
    """Return the tables of a run by name, each as a list of columns, since a layer may have the name of another column."""
    series = log.series()
    found = {"steps": [(name, getattr(series, name)) for name in Scalars._fields]}
    for name, weight in (("gradient_norms", False), ("weight_norms", True)):
        steps, norms = log.norms(weight)
        found[name] = [("step", steps), *((layer, norms[:, place]) for place, layer in enumerate(log.layers))]
    incidents = log.incidents
    of_each = ("opened_step", "confirmed_step", "closed_step", "kind", "severity", "verdict", "suspect")
    found["incidents"] = [(name, [getattr(one, name) for one in incidents]) for name in of_each]
    found["incidents"].append(("incident", [to_json(one) for one in incidents]))
    return found


def _csv(log: RunLog, folder: Path) -> list[Output]:
    return [
        Output(folder / f"{name}.csv", partial(_write_csv, columns), partial(_names_columns, columns))
        for name, columns in tables(log).items()
    ]


def _write_csv(columns: Table, path: Path) -> None:
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([column for column, _ in columns])
        plain = [values.tolist() if isinstance(values, np.ndarray) else values for _, values in columns]
        writer.writerows(zip(*plain, strict=True))


def _names_columns(columns: Table, path: Path) -> bool:
    """Return True if the first line of a file names these columns, or the first of them, since a model may have grown."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow([column for column, _ in columns])
    names = text.getvalue().encode()
    found, end, _ = beginning_of(path, len(names)).partition(b"\r\n")
    return bool(end) and (found + end == names or (b"," in found and names.startswith(found + b",")))


def _parquet(log: RunLog, folder: Path) -> list[Output]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError(missing("Writing Parquet", "pyarrow", "export")) from None

    def write(columns: Table, path: Path) -> None:
        names, values = zip(*columns, strict=True)
        table = pa.Table.from_arrays([pa.array(one) for one in values], list(names))
        parquet.write_table(table.replace_schema_metadata({_MARK: NAME}), path)

    def is_own(path: Path) -> bool:
        try:
            return _MARK.encode() in (parquet.read_schema(path).metadata or {})
        except (pa.ArrowException, OSError):
            return False

    return [
        Output(folder / f"{name}.parquet", partial(write, columns), is_own) for name, columns in tables(log).items()
    ]


def _tensorboard(log: RunLog, folder: Path) -> list[Output]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(missing("Writing TensorBoard files", "tensorboard", "tensorboard")) from None

    def write(path: Path) -> None:
        parts = path.with_name(f"{path.name}-parts")
        told, threading.excepthook = threading.excepthook, lambda _: None  # an error in its thread is raised here too
        try:
            with SummaryWriter(str(parts)) as writer:
                _write_events(log, writer)
            (made,) = parts.iterdir()
            made.rename(path)
        finally:
            threading.excepthook = told
            shutil.rmtree(parts, ignore_errors=True)

    def is_own(path: Path) -> bool:
        beginning = beginning_of(path, 1000)
        return b"brain.Event" in beginning and b"gradwatch/" in beginning

    return [Output(folder / "events.out.tfevents.0.gradwatch", write, is_own)]


def _write_events(log: RunLog, writer: SummaryWriter) -> None:
    series = log.series()
    times = log.times(series.id)
    for place in _evenly(len(series.step), _MOST_STEPS):
        step, when = int(series.step[place]), float(times[place])
        for name in ("loss", "global_norm", "clip_coefficient", "learning_rate", "loss_scale"):
            value = float(getattr(series, name)[place])
            if name == "global_norm" or not np.isnan(value):
                writer.add_scalar(f"gradwatch/{name}", value, step, when)
    for name, weight in (("gradient_norm", False), ("weight_norm", True)):
        steps, norms = log.norms(weight)
        for place in _evenly(len(steps), _MOST_LAYER_STEPS):
            for layer, value in zip(log.layers, norms[place].tolist(), strict=True):
                writer.add_scalar(f"gradwatch/{name}/{layer}", value, int(steps[place]))
    for incident in log.incidents:
        story = map(printable, (*incident.told, *(f"do: {line}" for line in incident.advice)))
        text = "\n\n".join([f"**{incident}**", *story])
        writer.add_text("gradwatch/incidents", text, incident.opened_step)


def _evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``, including the first and the last."""
    return list(dict.fromkeys(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(int).tolist()))
