"""Is this norm normal, and does my clip do anything? The answers, where they are known and where there is room."""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.records import ClipUse, UsualNorms
from gradwatch.reports.view import View
from gradwatch.runlog import RunLog
from gradwatch.runlog.latest import snapshot_of
from gradwatch.runlog.moment import Moment
from gradwatch.runlog.plain import from_json, to_json
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from pathlib import Path


class Keep(gradwatch.Report):
    """Keeps the last snapshot."""

    def step(self, snapshot: gradwatch.Snapshot) -> None:
        """Keep it."""
        self.kept = snapshot

    def close(self, snapshot: gradwatch.Snapshot) -> None:
        """Keep it."""
        self.kept = snapshot


def trained(
    steps: int, *, bound: float | None = None, clip: gradwatch.AutoClip | None = None, spoil_at: int | None = None
) -> tuple[gradwatch.Snapshot, gradwatch.Monitor]:
    """Train with a clip of the user's or of auto-clip's; the weights are multiplied by 20 after ``spoil_at``."""
    model, report = mlp(), Keep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def each(step: int) -> None:
        if bound is not None:
            nn.utils.clip_grad_norm_(model.parameters(), bound)
        if step == spoil_at:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(20)

    with gradwatch.attach(model, report=report, clip=clip, strict=True) as monitor:
        train(model, optimizer, steps, each=each)
    return report.kept, monitor


def drawn(snapshot: gradwatch.Snapshot, width: int, height: int) -> list[str]:
    """Return the rows of the live view in a terminal of this size."""
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    console.print(View(snapshot))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_the_usual_norms_are_nine_tenths_of_the_last_256() -> None:
    """Of those before the last one, which is named beside them."""
    snapshot, monitor = trained(400)
    norms, usual = monitor.history.global_norm(), snapshot.usual_norms
    assert usual is not None
    before = np.sort(norms[-257:-1])
    assert (usual.low, usual.high) == (before[12], before[-13])
    assert (usual.since, usual.now, usual.until) == (143, norms[-1], None)
    assert np.mean((before >= usual.low) & (before <= usual.high)) == pytest.approx(0.9, abs=0.01)
    text = f"norm usually {usual.low:.2g} to {usual.high:.2g} since step 143, now {usual.now:.2g}"
    assert str(usual) == text
    assert text in str(monitor.summary())


def test_an_explosion_does_not_become_usual_while_it_is_open() -> None:
    """The range is that before the incident, and the last norm is compared with its upper end."""
    snapshot, monitor = trained(303, spoil_at=300)
    (incident,) = monitor.incidents
    usual, norms = snapshot.usual_norms, monitor.history.global_norm()
    assert usual is not None
    assert usual.until == incident.opened_step == 301
    assert usual.high <= norms[:301].max()
    assert str(usual).split(" before ")[1] == f"the incident at step 301, now {usual.now:.1e}".replace(
        "e+0", "e"
    ).replace("e+", "e") + f", {usual.now / usual.high:.1e} times the upper end".replace("e+0", "e").replace("e+", "e")


def test_an_explosion_does_not_become_usual_once_it_is_over() -> None:
    """The range is of the other steps, and says so."""
    torch.manual_seed(0)
    model, report = nn.Linear(4, 1), Keep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=report, strict=True) as monitor:
        for step in range(500):
            x = torch.randn(32, 4)
            optimizer.zero_grad()
            ((model(x) - x[:, :1] - torch.randn(32, 1)) * (30.0 if step == 200 else 1.0)).square().mean().backward()
            optimizer.step()
        (incident,) = [one for one in monitor.incidents if one.severity != "notice"]
        assert incident.closed_step is not None
        norms, steps = monitor.history.global_norm()[:-1], monitor.history.steps()[:-1]
        within = (steps >= incident.opened_step) & (steps <= incident.closed_step)
    usual = report.kept.usual_norms
    assert usual is not None
    assert usual.high <= np.sort(norms[~within][-256:])[-13] < norms[within].max() / 10
    assert f"since step {usual.since} outside of incidents, now" in str(usual)


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        (UsualNorms(0.8, 3.1, 200, 2.2), "norm usually 0.8 to 3.1 since step 200, now 2.2"),
        (UsualNorms(0.8, 3.1, 200, 5.0), "norm usually 0.8 to 3.1 since step 200, now 5"),
        (UsualNorms(0.8, 3.1, 200, 31.0), "norm usually 0.8 to 3.1 since step 200, now 31, 10 times the upper end"),
        (UsualNorms(1.0, 1.0, 0, math.nan), "norm usually 1 since step 0, now NaN"),
        (UsualNorms(1.0, 2.0, 0, math.inf, 9), "norm usually 1 to 2 before the incident at step 9, now infinity"),
    ],
)
def test_a_norm_is_compared_where_it_can_be(norms: UsualNorms, text: str) -> None:
    """Not where it is not finite, nor inside the range."""
    assert str(norms) == text


def test_what_is_not_known_yet_is_not_said() -> None:
    """Before sixteen norms, and where nobody clips."""
    snapshot, monitor = trained(16)
    assert snapshot.usual_norms is None
    assert snapshot.clip_use is None
    assert "norm usually" not in str(monitor.summary())
    assert trained(17)[0].usual_norms is not None


def test_a_clip_is_judged_by_the_steps_that_it_cut() -> None:
    """Share, and the smallest part of a norm that it left."""
    snapshot, monitor = trained(300, bound=0.5)
    norms = monitor.history.global_norm()
    cut, least = np.mean(norms > 0.5), 0.5 / norms.max()
    use = snapshot.clip_use
    assert use is not None
    assert use.steps == 300
    assert use.cut / use.steps == pytest.approx(cut)
    assert use.least == pytest.approx(least, rel=1e-3)
    text = f"norm before your clip, which cut {100 * cut:.0f} % of the last 300 steps, never below {int(100 * least)} %"
    text += " of the norm"
    assert str(use) == text
    assert text in str(monitor.summary())


def test_a_clip_that_scales_up_is_said_to_have_done_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In summary, live view, card, page and run log: a norm above all of the run's, then one within them."""
    for norm in (100.0, 0.5):
        model, folder = mlp(), tmp_path / str(norm)
        policy = gradwatch.AutoClip(gradwatch.ScaleToNorm(norm), when="always")
        with gradwatch.attach(model, log=folder, report=None, strict=True, clip=policy) as monitor:
            train(model, torch.optim.SGD(model.parameters(), lr=1e-4), 60)
        norms = monitor.history.global_norm()
        cut, larger = int((norms > norm).sum()), int((norms < norm).sum())
        did, share = f"{cut or 'none'}", f"{100 * larger / 60:.0f} %"
        summary = str(monitor.summary())
        assert f": {cut} steps clipped, {larger} scaled up, 0 skipped" in summary
        assert f"of the last 60 steps and scaled up {share}" in summary
        assert (f"which cut {did} of" in summary) is (cut == 0)
        assert f"{larger} scaled up" in " ".join(drawn(monitor.snapshot(), 100, 24))
        with RunLog(folder) as log:
            assert snapshot_of(log).scaled_up == larger
        assert main(["report", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["scaled_up"] == larger


def test_clips_are_called_by_their_owner() -> None:
    """Yours, auto-clip's, or both."""
    policy = gradwatch.AutoClip(gradwatch.ClipNorm(0.3), when="always")
    for bound, clip, whose in (
        (100.0, None, "your clip"),
        (None, policy, "auto-clip"),
        (9.0, policy, "your clip and auto-clip"),
    ):
        use = trained(40, bound=bound, clip=clip)[0].clip_use
        assert use is not None
        assert use.whose == whose
    waiting = trained(40, clip=gradwatch.AutoClip("norm"))[0]
    assert waiting.clip_use is None  # it waits for an incident, and the line about auto-clip says what it did


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (ClipUse("your clip", 16, 0, math.nan), "norm before your clip, which cut none of the last 16 steps"),
        (
            ClipUse("your clip", 1024, 1, 0.9999),
            "norm before your clip, which cut 0.098 % of the last 1,024 steps, never below 99 %",
        ),
        (
            ClipUse("your clip", 100, 4, 0.349),
            "norm before your clip, which cut 4 % of the last 100 steps, never below 34 %",
        ),
        (
            ClipUse("your clip", 100, 100, 2e-6),
            "norm before your clip, which cut 100 % of the last 100 steps, never below 2e-4 %",
        ),
    ],
)
def test_a_bound_is_rounded_to_what_is_true(use: ClipUse, text: str) -> None:
    """Never below more than it was."""
    assert use.brief == text
    assert len(text) <= 82


@pytest.mark.parametrize("width", [30, 48, 60, 72, 80, 84, 120])
@pytest.mark.parametrize("height", [6, 10, 15, 16, 17, 24, 40])
def test_the_live_view_answers_where_there_is_room(width: int, height: int) -> None:
    """As a whole or not at all: no line is cut, no layer gives way in a small terminal, nothing is wider or higher."""
    snapshot, _ = trained(300, bound=0.5)
    rows = drawn(snapshot, width, height)
    assert len(rows) <= height - 1
    assert all(len(row) <= width for row in rows)
    answers = [row for row in rows if row.startswith("norm ")]
    norm, use = snapshot.usual_norms, snapshot.clip_use
    assert norm is not None
    assert use is not None
    fits = [next((f for f in (str(one), one.brief) if len(f) <= width), "") for one in (norm, use)]
    assert answers == ([f for f in fits if f] if height > 16 else [])
    if height > 16:
        assert sum("█" in row or "░" in row for row in rows) >= 6  # each layer has its bar


def test_the_live_view_shows_why_an_incident_is_open() -> None:
    """Its first sentence above what to do, in a terminal with room."""
    snapshot, monitor = trained(303, spoil_at=300)
    rows = drawn(snapshot, 120, 24)
    place = next(n for n, row in enumerate(rows) if "exploding" in row)
    assert rows[place + 1].strip().rstrip("…") in monitor.incidents[0].evidence[0]
    assert rows[place + 2].startswith("  do: ")
    assert not any(monitor.incidents[0].evidence[0][:20] in row for row in drawn(snapshot, 120, 14))


def test_a_run_log_answers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process shows the same; one of an earlier version has no answers and is read all the same."""
    model = mlp()
    with gradwatch.attach(model, log=tmp_path / "run", report=None, strict=True) as monitor:
        each = lambda _: nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # noqa: E731
        train(model, torch.optim.SGD(model.parameters(), lr=0.02), 60, each=each)
        told = [line.strip() for line in str(monitor.summary()).splitlines() if line.startswith("  norm ")]
    with RunLog(tmp_path / "run") as log:
        snapshot = snapshot_of(log)
    assert [str(snapshot.usual_norms), str(snapshot.clip_use)] == told
    assert main(["report", str(tmp_path / "run")]) == 0
    assert all(line in " ".join(capsys.readouterr().out.split()) for line in told[:1])
    record = to_json(Moment.of(snapshot))
    earlier = {name: value for name, value in json.loads(record).items() if name not in ("usual_norms", "clip_use")}
    assert from_json(Moment, json.dumps(earlier)).usual_norms is None
