"""The benchmarks as programs: their commands, their folders, and how runs are kept."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

import benchmarks
from benchmarks import runs
from tests.test_architecture import circles

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(benchmarks.__file__).parent
PAGES = [ROOT.parent / "README.md", ROOT.parent / "CONTRIBUTING.md", *(ROOT.parent / "docs").glob("*.md")]
COMMANDS = sorted(
    {name for page in PAGES for name in re.findall(r"python -m\s+(benchmarks[\w.]*\w)", page.read_text())}
)
FILES = {".".join(("benchmarks", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}


def known(path: Path) -> Iterator[str]:
    """Yield the files of the benchmarks that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                yield from {f"{node.module}.{name.name}", node.module} & set(FILES)


def folder_of(name: str) -> str:
    """Return the folder of a file, or the file at the root."""
    return name.split(".")[1]


def test_no_imports_go_in_circles() -> None:
    """Neither between files nor between folders."""
    arrows = {name: set(known(path)) for name, path in FILES.items()}
    assert len([name for name, ends in arrows.items() if ends]) > 40
    assert circles(arrows) == []
    folders: dict[str, set[str]] = {folder_of(name): set() for name in FILES}
    for name, ends in arrows.items():
        folders[folder_of(name)] |= {folder_of(end) for end in ends} - {folder_of(name)}
    assert circles(folders) == []


def test_each_folder_says_in_one_sentence_what_lives_there() -> None:
    """In its `__init__`, which holds nothing else."""
    for folder in {path.parent for path in FILES.values()}:
        (only,) = ast.parse((folder / "__init__.py").read_text()).body
        assert isinstance(only, ast.Expr)
        assert re.fullmatch(r"[^.]+\.", ast.literal_eval(only.value)), folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_a_page_names_tells_how_it_is_used(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own name, and without running anything."""
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.delitem(sys.modules, command, raising=False)  # a file that is a command and was imported before
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {command} ")


def test_the_pages_name_all_commands() -> None:
    """Each folder with a `__main__` is one; halves and labels are made by two others."""
    mains = {name.removesuffix(".__main__") for name in FILES if name.endswith(".__main__")}
    assert mains | {"benchmarks.faults.programs", "benchmarks.faults.outcome"} == set(COMMANDS)


def made(job: str) -> dict[str, Any]:
    """Return something that no other run returns; "bad" fails."""
    if job == "bad":
        raise ValueError(job)
    return {"job": job, "lot": uuid.uuid4().hex}


def test_runs_that_are_finished_are_kept_though_another_fails(tmp_path: Path) -> None:
    """A later command takes them as they are, and makes the others."""
    files = {job: runs.kept_at(tmp_path / "new", job) for job in ("one", "bad", "two")}
    with pytest.raises(RuntimeError, match="bad failed: ValueError"):
        runs.run_missing(made, files, Console(quiet=True), "runs")
    assert files["one"].exists()
    assert not files["bad"].exists()
    files["three"] = runs.kept_at(tmp_path / "new", files.pop("bad").name)
    first, second = (runs.run_missing(made, files, Console(quiet=True), "runs") for _ in range(2))
    assert {job: found["job"] for job, found in first.items()} == {"one": "one", "two": "two", "three": "three"}
    assert first == second


def test_kept_runs_end_with_the_sources_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a folder and a file changes with each source in them, and with nothing else."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    sources = [tmp_path / "folder" / "inner" / "a.py", tmp_path / "b.py"]
    for source in sources:
        source.write_text("before")
    found = {runs.digest("folder", "b.py")}
    (tmp_path / "folder" / "table.json").write_text("{}")
    assert {runs.digest("folder", "b.py")} == found
    for source in sources:
        source.write_text("after")
        found.add(runs.digest("folder", "b.py"))
    assert len(found) == 3
