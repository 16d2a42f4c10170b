"""Files that commands write: all or none of them, and never in the place of one that gradwatch did not write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.runlog import RunLog
from gradwatch.runlog.schema import FILE
from tests.test_run_log import watched
from tests.test_run_log_left_alone import content, held
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = ("steps", "gradient_norms", "weight_norms", "incidents")
EVENTS = "events.out.tfevents.0.gradwatch"
FILES = {
    "html": ["page.html"],
    "csv": [f"{name}.csv" for name in TABLES],
    "parquet": [f"{name}.parquet" for name in TABLES],
    "tensorboard": [EVENTS],
}


def typed(kind: str, run: Path, out: Path, *more: str) -> list[str]:
    """Return the command line that writes files of a kind into a folder."""
    if kind == "html":
        return ["report", str(run), "--html", str(out / "page.html"), *more]
    return ["export", str(run), "--to", kind, "--out", str(out), *more]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log of five steps."""
    watched(tmp_path / "run", steps=5)
    return tmp_path / "run"


def foreign(path: Path, like: str) -> bytes:
    """Put another program's file at ``path`` that looks much like one of gradwatch's; return its bytes."""
    if like == "html":
        path.write_text("<!DOCTYPE html>\n<html><head><title>gradwatch</title></head><body>my thesis</body></html>")
    elif like == "csv":
        path.write_text("step,loss\n1,2\n" if path.name != "incidents.csv" else "opened_step,what\n3,4\n")
    elif like == "parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install 'gradwatch[export]'")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"step": [1], "loss": [2.0]}), path)
    else:
        path.write_bytes(b"brain.Event:2 of another program")
    return path.read_bytes()


@pytest.mark.parametrize("like", ["same", "text"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_program_is_replaced_only_if_that_is_said(
    kind: str, like: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of the files it is, and much alike: nothing is written beside it either; an earlier one of its own is."""
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES[kind]:
        before = foreign(out / name, kind if like == "same" else "csv")
        assert main(typed(kind, run, out)) == 2
        assert "exists and was not written by gradwatch" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_bytes() == before
        assert main(typed(kind, run, out, "--overwrite")) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES[kind])
        assert (out / name).read_bytes() != before
        assert main(typed(kind, run, out)) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES[kind])
        for path in out.iterdir():
            path.unlink()


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_the_log_itself_is_never_written_over(
    more: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor what SQLite may put beside it, there or not, by whatever name it is reached; also with --overwrite."""
    with RunLog(run):
        (tmp_path / "linked").symlink_to(run)
        (tmp_path / "hard").hardlink_to(run / FILE)
        names = (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal", "writer.lock")
        before = content(run)
        for target in (
            *(run / name for name in names),
            *(tmp_path / "linked" / name for name in names),
            tmp_path / "hard",
        ):
            assert main(["report", str(run), "--html", str(target), *more]) == 2
            assert "is part of a run log" in " ".join(capsys.readouterr().err.split())
            assert content(run) == before
    moved = tmp_path / "moved" / "steps.csv"
    moved.parent.mkdir()
    moved.write_bytes((run / FILE).read_bytes())
    assert main(["export", str(moved), "--to", "csv", "--out", str(moved.parent), *more]) == 2
    assert "is part of a run log" in " ".join(capsys.readouterr().err.split())
    with RunLog(moved) as log:
        assert len(log.series().step) == 5


def test_a_page_over_the_log_of_a_training_here_takes_no_lock_away(run: Path, tmp_path: Path) -> None:
    """To look whether a file may be replaced opens nothing that this process has open."""
    model = mlp()
    with gradwatch.attach(model, report=None, log=tmp_path / "live"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 5)
        for of in (run, tmp_path / "live"):
            for name in (FILE, f"{FILE}-shm", f"{FILE}-wal", "writer.lock"):
                assert main(["report", str(of), "--html", str(tmp_path / "live" / name), "--overwrite"]) == 2
        assert held(tmp_path / "live" / FILE)
        with RunLog(tmp_path / "live") as log:
            assert log.is_written


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_folder_in_the_place_of_one_file_stops_all(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first is written."""
    (tmp_path / "out" / FILES[kind][-1]).mkdir(parents=True)
    assert main(typed(kind, run, tmp_path / "out", "--overwrite")) == 2
    assert "is not a regular file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILES[kind][-1]]


LIMITED = """
import resource, signal, sys
from gradwatch.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("kind", "earlier"),
    [*((kind, True) for kind in FILES), ("csv", False)],
    ids=[*(f"{kind} over an earlier one" for kind in FILES), "for the first time"],
)
def test_a_disk_that_fails_midway_leaves_what_was_there(
    kind: str,
    earlier: bool,
    run: Path,
    tmp_path: Path,
) -> None:
    """The files of before or none, and no folder, in a process that may write files of a few hundred bytes only."""
    out = tmp_path / "new" / "out" if kind != "html" else tmp_path / "out"
    if earlier or kind == "html":
        out.mkdir(parents=True)
    if earlier:
        assert main(typed(kind, run, out)) == 0
    before, most = content(tmp_path), {"csv": "300"}.get(kind, "100")
    command = [sys.executable, "-c", LIMITED, most, *typed(kind, run, out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gradwatch: ")
    assert done.stderr.count("\n") == 1
    left = {name: told for name, told in content(tmp_path).items() if not name.startswith("run/")}
    assert left == {name: told for name, told in before.items() if not name.startswith("run/")}
    assert (tmp_path / "new").exists() == (earlier and kind != "html")


def test_an_export_of_a_model_that_has_grown_replaces_the_one_before(tmp_path: Path) -> None:
    """Its columns are the first of today's."""
    model, optimizer = mlp(), None
    for step in range(2):
        with gradwatch.attach(model, report=None, log=tmp_path / "run"):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            train(model, optimizer, 5)
        for kind in ("csv", "parquet", "tensorboard"):
            assert main(typed(kind, tmp_path / "run", tmp_path / kind)) == 0
        if step == 0:
            model.append(nn.Linear(1, 1))
    header = (tmp_path / "csv" / "gradient_norms.csv").read_text().splitlines()[0]
    assert header.endswith("5.weight,5.bias") or header.count(",") == len(list(model.parameters()))


def test_a_link_stays_and_what_it_leads_to_is_written(run: Path, tmp_path: Path) -> None:
    """With the mode that the file had."""
    (tmp_path / "site").mkdir()
    page = tmp_path / "site" / "index.html"
    page.write_text("")
    page.chmod(0o640)
    (tmp_path / "page.html").symlink_to(page)
    assert main(typed("html", run, tmp_path)) == 0
    assert (tmp_path / "page.html").is_symlink()
    assert page.read_text().startswith("<!doctype html>")
    assert page.stat().st_mode & 0o777 == 0o640


def test_a_page_may_go_into_a_pipe(run: Path, tmp_path: Path) -> None:
    """As in `gradwatch report RUN --html /dev/stdout | gzip`."""
    command = [sys.executable, "-m", "gradwatch", "report", str(run), "--html", "/dev/stdout"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert done.stdout.startswith("<!doctype html>")
    assert "</html>" in done.stdout


ODD: dict[str, Callable[[Path], str]] = {
    "folder": str,
    "300 characters": lambda folder: f"{folder}/{'x' * 300}",
    "below a file": lambda folder: f"{folder}/file/page.html",
    "nowhere": lambda _: "/proc/nothing/page.html",
    "circle": lambda folder: f"{folder}/circle",
    "stray byte": lambda folder: f"{folder}/file/\udcff",
}


@pytest.mark.parametrize(
    ("option", "kind"),
    [*(("--html", kind) for kind in ODD), *(("--out", kind) for kind in ODD if kind != "folder")],
)
def test_an_odd_place_is_told_in_one_line(
    option: str, kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the option that names another; nothing is written."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = content(tmp_path)
    command = ["report", str(run)] if option == "--html" else ["export", str(run), "--to", "csv"]
    assert main([*command, option, ODD[kind](tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gradwatch: ")
    assert said.count("\n") == 1
    assert option in said
    left = {name: told for name, told in content(tmp_path).items() if not name.startswith("run/")}
    assert left == {name: told for name, told in before.items() if not name.startswith("run/")}
