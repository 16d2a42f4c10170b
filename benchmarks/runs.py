"""Runs of a benchmark are made on two processes, and kept below ``build/`` until what they ran on changes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import track

from benchmarks.pages import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

Job = TypeVar("Job")


def digest(*places: str) -> str:
    """Return a digest of the sources at these places of the repository, which are files or folders."""
    found = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(source.read_bytes())
    return found.hexdigest()[:12]


def kept_at(folder: Path, key: str) -> Path:
    """Return the file for the result of a run."""
    return folder / (hashlib.sha256(key.encode()).hexdigest()[:16] + ".json")


def run_missing(
    do: Callable[[Job], dict[str, Any]], files: dict[Job, Path], console: Console, what: str
) -> dict[Job, dict[str, Any]]:
    """Run the jobs whose file is not there yet, and write it; return the results of all jobs."""
    results = {job: json.loads(path.read_text()) for job, path in files.items() if path.exists()}
    failed: dict[Job, Exception] = {}
    with ProcessPoolExecutor(2) as pool:
        running = {pool.submit(do, job): job for job in files if job not in results}
        for done in track(as_completed(running), total=len(running), description=what, console=console):
            job = running[done]
            try:
                results[job] = done.result()
            except Exception as error:  # the others' results shall be kept before this one ends the command
                failed[job] = error
                continue
            files[job].parent.mkdir(parents=True, exist_ok=True)
            files[job].write_text(json.dumps(results[job]))
    for job, cause in failed.items():
        raise RuntimeError(f"{job} failed: {cause!r}") from cause
    return results
