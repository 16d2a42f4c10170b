"""What gradwatch says during a run, as plain lines by section."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import gradwatch
from benchmarks.faults.program import run_program
from gradwatch.reports.summary import Summary

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.sentences.trainings import Training

Said = dict[str, list[str]]  # lines by section
_CODE = re.compile(r"\((\w+\d+)\)$")


def form_of(line: str) -> str:
    """Return a line without what differs from run to run: names of layers, numbers, and how many layers more."""
    line = re.sub(r"; the same rule fired for [^()]+", "", line)
    return re.sub(r"[\d.,]+(e-?\d+)?", "N", re.sub(r"\b\w+(\.\w+)*\.(\w+_)?(weight|bias)\w*", "LAYER", line))


class Listener(gradwatch.Report):
    """Collects what a run says, each line once for all numbers and layers that it may name."""

    def __init__(self) -> None:
        self.said: Said = {}
        self._known: set[tuple[str, str]] = set()

    def step(self, snapshot: gradwatch.Snapshot) -> None:
        """Collect the incidents that changed."""
        for incident in snapshot.news:
            self._hear("incidents", str(incident))
            for line in incident.evidence:
                code = _CODE.search(line)
                self._hear(f"rule {code[1]}" if code else "findings", line)
            for line in incident.advice:
                self._hear(f"advice: {incident.kind}", line)

    def close(self, snapshot: gradwatch.Snapshot) -> None:
        """Collect the notes, what auto-clip did, and the answers."""
        self.step(snapshot)
        for incident in snapshot.incidents:
            if incident.clip is not None:
                self._hear("auto-clip", str(incident.clip))
        for note in snapshot.notes:
            code = _CODE.search(note.rstrip("."))
            self._hear(f"rule {code[1]}" if code else "notes", note)
        for answer in (snapshot.usual_norms, snapshot.clip_use):
            if answer is not None:
                self._hear("norm and clip", str(answer))
        for line in str(Summary(snapshot)).splitlines():
            if line.startswith("gradwatch ") or "although no incident is open" in line:
                self._hear("summary", line.strip())

    def _hear(self, section: str, line: str) -> None:
        form = form_of(line)
        if (section, form) not in self._known:
            self._known.add((section, form))
            self.said.setdefault(section, []).append(line)


class _Watching:
    """Attaches gradwatch to a run with a listener."""

    def __init__(self, *, clip: bool) -> None:
        self.listener = Listener()
        self._clip = "norm" if clip else None

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        self._monitor = gradwatch.attach(model, clip=self._clip, report=self.listener)

    def step(self, loss: float) -> None:
        """See `benchmarks.faults.program.Watcher`."""

    def done(self) -> None:
        """End the watching, which closes the listener."""
        self._monitor.detach()


def listen(training: Training, seed: int = 0) -> Said:
    """Return what gradwatch says of a training."""
    watching = _Watching(clip=training.clip)
    try:
        run_program(training.train, seed, training.steps, watching)
    except gradwatch.TrainingUnstableError as error:
        watching.listener.said["errors"] = [str(error)]
    watching.done()
    return watching.listener.said
