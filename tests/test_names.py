"""Names: that of a run, wherever it is shown, and those of layers, short and still apart."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.reports.log import LogReport
from gradwatch.reports.names import labels_of, names_of
from gradwatch.reports.view import View
from gradwatch.runlog import RunLog
from tests.browser import needs_browser, page
from tests.test_reports import drawn, snapshot

if TYPE_CHECKING:
    from pathlib import Path

COMMON = {
    ("fc1.weight", "fc1.bias", "fc2.weight"): "",
    ("model.fc1.weight", "model.fc1.bias", "model.fc2.weight"): "model.",
    ("module._orig_mod.fc1.weight", "module._orig_mod.fc2.weight"): "module._orig_mod.",
    ("module.0.weight", "module.2.weight"): "module.",
    ("_orig_mod.0.weight", "_orig_mod.2.weight"): "_orig_mod.",
    ("model.layers.0.q.weight", "model.layers.11.q.weight"): "model.",
    ("net.0.weight", "net.0.bias"): "",
    ("model.fc.weight",): "model.",
    ("weight", "bias"): "",
    ("w",): "",
    ("encoder.a.weight", "encoder2.a.weight"): "",
    (
        "_functional._torch_params.sequential/dense/kernel",
        "_functional._torch_params.sequential/dense_1/kernel",
    ): "_functional._torch_params.sequential/",
}


@pytest.mark.parametrize(("layers", "common"), COMMON.items())
def test_views_leave_out_what_all_names_have_in_common(layers: tuple[str, ...], common: str) -> None:
    """Whole parts only, two of each name remain, and a number keeps the word before it unless that is a wrapper's."""
    assert names_of(layers).common == common


def test_names_inside_sentences_are_shortened_and_code_is_not() -> None:
    """Of layers and of modules; files and calls that begin with the same word stay."""
    names = names_of(("model.enc.fc.weight", "model.enc.fc.bias", "model.head.weight"))
    text = (
        "`log` at model.py:42 in model.enc.fc (forward): model.head.weight, then model.enc.fc.bias. Call model.head(x), "
        "self.model.head or model.heads; 'model.enc' left. The end of the model. Over model.head."
    )
    assert names.told(text) == (
        "`log` at model.py:42 in enc.fc (forward): head.weight, then enc.fc.bias. Call model.head(x), "
        "self.model.head or model.heads; 'enc' left. The end of the model. Over head."
    )


@pytest.mark.parametrize("width", [12, 20, 30])
def test_a_shortened_name_keeps_what_tells_it_from_others(width: int) -> None:
    """Blocks of one kind differ by their number in the middle of a long name."""
    layers = tuple(
        f"transformer.blocks.{block}.attention.output_projection_of_all_heads.{kind}"
        for block in range(12)
        for kind in ("weight", "bias")
    )
    labels = labels_of(layers, width)
    assert len(set(labels)) == len(layers)
    assert max(map(cell_len, labels)) <= width
    if width >= 20:
        assert all(re.search(rf"\b{index // 2}\b", label) for index, label in enumerate(labels)), labels
    if width == 30:
        assert labels[22].endswith(".weight")
        assert labels[23].endswith(".bias")


part = st.text("ab", min_size=1, max_size=9)


@given(
    st.lists(st.lists(part, min_size=1, max_size=5).map(".".join), min_size=1, max_size=30, unique=True),
    st.integers(6, 40),
)
def test_labels_of_different_layers_differ(layers: list[str], width: int) -> None:
    """At any width from six cells on, whatever the names are; none is wider."""
    labels = labels_of(tuple(layers), width)
    assert len(set(labels)) == len(layers)
    assert max(map(len, labels)) <= width


class Wrapped(nn.Module):
    """A network inside another module, as trainers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 1)})

    def forward(self, x: torch.Tensor) -> Any:
        """Return the prediction for ``x``, shape (n, 1)."""
        return self.model["second"](torch.relu(self.model["first"](x)))


def explode(folder: Path, **settings: Any) -> gradwatch.Monitor:
    """Train for 60 steps, of which the 50th explodes, with a run log."""
    torch.manual_seed(0)
    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    with gradwatch.attach(model, log=folder, **settings) as monitor:
        for step in range(60):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (1e5 if step == 50 else 1)).backward()
            optimizer.step()
    return monitor


def test_the_name_of_a_run_stands_in_every_report_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines, summary, representation, live view, `list` and the facts of the run log; layers are short in views only."""
    lines = io.StringIO()
    monitor = explode(tmp_path / "run", report=LogReport(lines), name=" generator ")
    told = lines.getvalue()
    assert "gradwatch | generator | step 50 | exploding" in told
    assert "60 steps of generator (Wrapped) (4 layers" in told
    assert repr(monitor).startswith("<gradwatch.Monitor of generator (Wrapped), detached")
    with RunLog(tmp_path / "run") as log:
        assert log.sessions[0].facts.name == "generator"
        assert all(layer.startswith("model.") for layer in log.layers)
    assert main(["list", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "generator"
    assert main(["list", str(tmp_path)]) == 0
    assert "generator (Wrapped)" in capsys.readouterr().out
    suspect = monitor.incidents[0].suspect or ""
    assert suspect.startswith("model.")  # in data the name is whole, and in the lines of a log, in which people search
    assert f"prime suspect {suspect}" in told.partition("60 steps of")[0]
    summary = str(monitor.summary())
    assert suspect not in summary
    assert f"prime suspect {suspect.removeprefix('model.')}" in summary
    assert 'names of layers without "model.", with which all begin' in summary


@pytest.mark.parametrize("width", [30, 40, 80])
def test_the_live_view_names_the_run(width: int) -> None:
    """Before the verdict, which is always whole; shortened where there is no room."""
    facts = snapshot().facts
    first = drawn(View(snapshot(facts=replace(facts, name="generator of pictures"))), width, 24)[0]
    assert "● confirmed" in first
    assert first.startswith("gradwatch generator of pictures ●" if width == 80 else "g")
    assert len(first) <= width


def test_views_name_what_they_leave_out() -> None:
    """In the heading of the list, if there is room."""
    shown = replace(snapshot(3), layers=("model.a.weight", "model.a.bias", "model.b.weight"))
    lines = drawn(View(shown), 80, 24)
    assert lines[3].startswith("closest to their limits · model.… ")
    assert lines[4].startswith("a.weight ")


def test_a_name_that_says_nothing_is_refused() -> None:
    """Blank, or no text."""
    for name in ("", "  ", 3):
        with pytest.raises(gradwatch.UsageError, match=r'expected a name for the model, such as "generator"'):
            gradwatch.attach(nn.Linear(2, 1), report=None, name=name)  # type: ignore[arg-type]


@needs_browser
def test_the_page_has_the_name_of_the_run_and_short_names_of_layers(tmp_path: Path) -> None:
    """It says what it leaves out."""
    explode(tmp_path / "run", report=None, name="generator")
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    with page(tmp_path / "page.html") as driver:
        text = " ".join(str(driver.execute_script("return document.body.innerText")).split())
    assert "generator (Wrapped) · 4 layers" in text
    assert "all begin with model., which is left out here" in text
    assert "first.weight" in text
    assert "model.first" not in text
