"""The card in a notebook: in real kernels, what stands below which cell; and in a browser, light and dark."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import cells
from gradwatch.reports.card import _style, card_of
from gradwatch.reports.notebook import NotebookReport
from gradwatch.reports.summary import Summary
from tests.browser import needs_browser, page
from tests.kernel import Kernel, executed, kernel
from tests.test_reports import snapshot
from tests.trainings import train

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
NEW = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
model.itself = [model]  # only the collector can free it
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
"""


@pytest.fixture(scope="module")
def book() -> Iterator[Kernel]:
    """One kernel for all tests of this file; each leaves no monitor behind."""
    with kernel() as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_attached(book: Kernel) -> Iterator[None]:
    """After each test the kernel has no monitor, and its shell calls nothing of gradwatch."""
    yield
    book.run(
        "import gc\nfor one in list(gradwatch.monitor.attached.values()): one.detach()\nmodel = None; gc.collect()"
    )
    assert book.told("[str(f) for f in get_ipython().events.callbacks['post_run_cell'] if 'gradwatch' in str(f)]") == []


def visible(html: str) -> str:
    """Return the text of a card, as one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<style>.*?</style>", "", html)).split())


def test_a_card_stands_below_the_cell_that_trains_and_follows_it(book: Kernel) -> None:
    """One output, with the last step of the cell; a later cell has its own, and the first keeps what was true at its end."""
    first = book.run(NEW + "monitor = gradwatch.attach(model)\nfor _ in steps(range(60)): pass")
    second = book.run("for _ in steps(range(60, 65)): pass")
    assert len(book.outputs(first)) == len(book.outputs(second)) == 1
    assert "healthy Sequential gradwatch · step 59 · SGD 0.01" in visible(book.outputs(first)[0])
    assert "healthy Sequential gradwatch · step 64" in visible(book.outputs(second)[0])
    assert "closest to their limits" in visible(book.outputs(second)[0])
    before = book.outputs(first)
    end = book.run("monitor.detach()")
    assert book.outputs(end) == []
    assert book.outputs(first) == before
    assert "gradwatch · 65 steps · SGD" in visible(book.outputs(second)[0])  # the summary, in place of the card


def test_it_is_drawn_twice_a_second_at_most_and_never_beside_the_training(book: Kernel) -> None:
    """Whatever happens to the run; a cell that only waits publishes nothing."""
    began = time.monotonic()
    first = book.run(NEW + "short = False\nmonitor = gradwatch.attach(model)\nfor _ in steps(range(250)): pass")
    seconds = time.monotonic() - began
    waits = book.run("time.sleep(1.2)")
    kinds = [kind for index, kind in book.messages if index == first]
    assert kinds[0] == "display_data"
    assert set(kinds[1:]) == {"update_display_data"}
    assert len(kinds) <= seconds / NotebookReport.period + 3
    assert len(kinds) >= 3
    assert [kind for index, kind in book.messages if index == waits] == []
    assert "exploding" in visible(book.outputs(first)[0])
    assert book.told("[t.name for t in __import__('threading').enumerate() if 'gradwatch' in t.name]") == []
    book.run("short = True")


def test_the_attach_cell_run_again_with_the_same_model_replaces_the_monitor_and_says_so(book: Kernel) -> None:
    """On the card, once it trains."""
    book.run(NEW)
    cell = book.run("monitor = gradwatch.attach(model)")
    book.run("for _ in steps(range(10)): pass")
    book.run("first = monitor")
    book.again(cell)
    trains = book.run("for _ in steps(range(10)): pass")
    assert book.told("(first.attached, monitor.attached)") == (False, True)
    said = "note: this Sequential was watched already, for 10 steps: that monitor is detached."
    assert said in visible(book.outputs(trains)[0])


def test_a_cell_that_makes_the_model_anew_ends_what_it_attached_before(book: Kernel) -> None:
    """At once and in its own output, although the old model lives; nothing of it appears in a later cell."""
    cell = book.run(NEW + "monitor = gradwatch.attach(model, report='log')\nfor _ in steps(range(10)): pass")
    book.run("kept, first = model, monitor")
    book.again(cell)
    assert book.told("(first.attached, monitor.attached)") == (False, True)
    told = "an earlier run of this cell attached to another Sequential, which was still watched, for 10 steps"
    assert told in book.told("monitor.notes")[0]
    below = "".join(book.outputs(cell))
    assert below.count("healthy: 10 steps of Sequential") == 1
    assert f"gradwatch | step 0 | note: {told}" in below
    later = book.run("kept = None; import gc; gc.collect()\nprint('later')")
    assert "".join(book.outputs(later)).split() == ["later"]


def test_models_of_one_run_of_a_cell_and_other_names_live_side_by_side(book: Kernel) -> None:
    """The two of a GAN; and a cell that is run again with another name, to compare."""
    cell = book.run(
        "nets = [nn.Linear(8, 1) for _ in range(2)]\n"
        "monitors = [gradwatch.attach(net, name=name) for net, name in zip(nets, ['generator', 'critic'])]"
    )
    assert book.told("[one.attached for one in monitors]") == [True, True]
    book.run("held = nets, monitors")
    book.nb.cells[cell].source = book.nb.cells[cell].source.replace("'critic'", "'judge'")
    book.nb.cells[cell].metadata["cellId"] = "edited"
    book.again(cell)  # to this kernel it is another cell, as its code is another
    assert book.told("[one.attached for one in held[1] + monitors]") == [True] * 4
    book.again(cell)
    assert book.told("[one.attached for one in held[1] + monitors]") == [True] * 4
    book.run("for one in held[1] + monitors: one.detach()\nheld = nets = monitors = None")


def test_a_cell_is_known_by_its_identity_even_when_it_was_edited(book: Kernel) -> None:
    """Notebooks that send one; otherwise its code stands for it."""
    send = (
        "shell = get_ipython(); parent = shell.get_parent()\n"
        "from gradwatch.cells import running_cell\n"
        "parent['metadata'] = {'cellId': 'a1'}; shell.set_parent(parent)\n"
        "known = running_cell()"
    )
    book.run(send)
    assert book.told("known.key") == "a1"
    assert book.told("running_cell().key") == "print(repr(running_cell().key))"
    assert cells.running_cell() is None  # in a program


def test_a_training_thread_keeps_to_the_card_of_the_cell_that_began_it(book: Kernel) -> None:
    """While other cells run, nothing appears below them."""
    first = book.run(
        NEW
        + "import threading\nmonitor = gradwatch.attach(model)\ndef go():\n    for _ in steps(range(300)): pass\n"
        + "thread = threading.Thread(target=go); thread.start(); time.sleep(0.3)"
    )
    later = book.run("time.sleep(0.7)")
    joined = book.run("thread.join()")
    ended = book.run("monitor.detach()")
    assert [book.outputs(one) for one in (later, joined, ended)] == [[], [], []]
    assert "300 steps" in visible(book.outputs(first)[0])


def test_a_process_that_is_forked_from_a_kernel_writes_lines(book: Kernel) -> None:
    """What it displays would be dropped; a card that was begun before stays with its kernel."""
    first = book.run(NEW + "monitor = gradwatch.attach(model)\nfor _ in steps(range(3)): pass")
    forked = book.run(
        "import os, sys\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for _ in steps(range(3)): pass\n"
        "    gradwatch.attach(model)\n"
        "    for _ in steps(range(5)): pass\n"
        "    gradwatch.monitor_of(model).detach(); sys.stderr.flush(); sys.stdout.flush(); os._exit(0)\n"
        "print('ended', os.waitpid(child, 0)[1])\ntime.sleep(0.5)"
    )
    told = "".join(book.outputs(forked))
    assert "ended 0" in told
    assert "healthy: 5 steps of Sequential" in told
    assert "step 2 ·" in visible(book.outputs(first)[0])


def test_monitor_and_summary_draw_themselves(book: Kernel) -> None:
    """As cards, with plain text beside them for whoever cannot show HTML; before the first step too."""
    book.run(NEW + "monitor = gradwatch.attach(model, report=None, name='<b>critic')")
    before = book.run("monitor")
    assert "&lt;b&gt;critic (Sequential) gradwatch · no step yet" in visible(book.outputs(before)[0])
    book.run("for _ in steps(range(20)): pass")
    shown, summed = book.run("monitor"), book.run("monitor.summary()")
    assert "gradwatch · step 19 · SGD" in visible(book.outputs(shown)[0])
    assert "gradwatch · 20 steps · SGD" in visible(book.outputs(summed)[0])
    assert "measured at optimizer step" in visible(book.outputs(summed)[0])
    text = book.nb.cells[summed].outputs[0]["data"]["text/plain"]
    assert text.startswith("gradwatch healthy: 20 steps of <b>critic (Sequential) (4 layers")


def test_the_line_of_a_finding_is_named_by_its_cell(book: Kernel) -> None:
    """As notebooks number them, and not by the temporary file that Python sees."""
    define = book.run(
        "class Log(nn.Module):\n    def forward(self, x):\n        return torch.log(torch.relu(x) * 0)\n"
        "model = nn.Sequential(nn.Linear(8, 1), Log())\noptimizer = torch.optim.SGD(model.parameters(), lr=0.01)"
    )
    book.run(
        "monitor = gradwatch.attach(model, report=None, forensics=True)\n"
        "for _ in range(3):\n    optimizer.zero_grad(); model(x).mean().backward(); optimizer.step()"
    )
    number = book.nb.cells[define].execution_count
    assert f"at cell In[{number}]:3 in 1" in book.told("str(monitor.incidents[0].origin)")


def test_an_interrupted_cell_keeps_its_last_step(book: Kernel) -> None:
    """The training raises: the card has the state in which it did."""
    code = NEW + "monitor = gradwatch.attach(model)\nfor step in steps(range(100)):\n    if step == 42: break\n"
    cell = book.run(code + "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt: print('stopped')")
    assert any("step 42" in visible(one) for one in book.outputs(cell))


def test_a_trainers_callback_shows_the_card_too(book: Kernel) -> None:
    """Beside what the trainer draws; all callbacks are made of a session."""
    cell = book.run(
        NEW
        + "from gradwatch.integrations.session import Session\nsession = Session(None, 5, {})\nsession.begin(model)\n"
        + "for _ in steps(range(30)): print('bar', end=chr(13))\nsession.end()"
    )
    shown = book.outputs(cell)
    assert "".join(one for one in shown if "<style>" not in one).replace("\r", "").replace("bar", "") == ""
    (card,) = (visible(one) for one in shown if "<style>" in one)
    assert "healthy Sequential gradwatch · 30 steps" in card


def test_outside_a_notebook_the_card_gives_way_to_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, once."""
    model = nn.Linear(8, 1)
    with gradwatch.attach(model, report="notebook"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), steps=3)
    told = capsys.readouterr().err
    assert told.count("this is no notebook: log lines instead of the card") == 1
    assert "3 steps of Linear" in told


def test_a_card_escapes_what_is_foreign_and_shows_every_number() -> None:
    """Names, notes and evidence are text; NaN and Inf are spelled out."""
    evil = '<img src=x onerror="harmed=1">'
    one = replace(snapshot(3), layers=(evil, "b.weight", "c.weight"), notes=(evil, "two"))
    for live in (True, False):
        html = card_of(one, live=live)
        assert "<img" not in html
        assert "global norm <b>NaN</b>" in html
        assert "note: two" in html
    assert "&lt;img" in card_of(one, live=True)
    assert html == Summary(one)._repr_html_()
    assert repr(Summary(one)) == str(Summary(one))


CONTRAST = """
function light(colour) {
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const card = document.querySelector(".gradwatch"), paper = light(getComputedStyle(card).backgroundColor);
const found = [];
for (const one of card.querySelectorAll("*")) {
  if (![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  const ink = light(getComputedStyle(one).color);
  found.push((Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
}
return { paper, least: Math.min(...found), count: found.length, wide: card.scrollWidth - card.clientWidth };
"""


@needs_browser
def test_the_card_is_readable_in_light_and_dark_notebooks_of_any_width(tmp_path: Path) -> None:
    """All text has the contrast that accessibility guidelines ask for (4.5 to 1), and nothing sticks out."""
    card = card_of(snapshot(300), live=True)
    text = f'<!doctype html><html data-drawn="yes"><meta charset="utf-8"><body>{card}</body></html>'
    (tmp_path / "card.html").write_text(text, encoding="utf-8")
    hosts = {"data-jp-theme-light": ("true", "false"), "class": ("vscode-light", "vscode-dark")}
    with page(tmp_path / "card.html") as driver:
        for width in (1000, 420):
            driver.set_window_size(width, 1600)
            for attribute, (light, dark) in hosts.items():
                for value in (light, dark):
                    driver.execute_script("document.body.setAttribute(arguments[0], arguments[1])", attribute, value)
                    seen = driver.execute_script(CONTRAST)
                    assert (seen["paper"] > 0.8) == (value == light), (width, value)
                    assert seen["least"] >= 4.5, (width, value)
                    assert seen["count"] > 20
                    assert seen["wide"] <= 0, (width, value)
                driver.execute_script("document.body.removeAttribute(arguments[0])", attribute)


def titles(book: Any) -> list[list[str]]:
    """Return, for each cell with code, what heads its outputs: the verdict and the name of a card, the first words of a text."""
    found = []
    for cell in book.cells:
        if cell.cell_type == "code":
            texts = [visible(output.get("data", {}).get("text/html", "")) for output in cell.outputs]
            found.append([text.partition(" gradwatch ·")[0].lstrip("● ") for text in texts])
    return found


def test_the_example_shows_what_it_shows_when_it_is_run() -> None:
    """The outputs that are kept are those of today, with today's style, and nothing of the machine that made them."""
    kept, text = nbformat.read(EXAMPLE, as_version=4), EXAMPLE.read_text(encoding="utf-8")
    assert re.findall(r'(?:"|\s)/(?:home|root|tmp|work|usr|Users|opt)/', text) == []
    assert "iopub" not in text  # times at which cells ran
    assert len(text) < 100_000
    fresh = executed(EXAMPLE)
    assert titles(fresh) == titles(kept)
    assert titles(kept)[1] == ["confirmed watched only (Sequential)"]
    assert titles(kept)[3:] == [["healthy auto-clip (Sequential)"]] * 2
    shown = json.dumps(kept)
    assert "it helped" in shown
    assert json.dumps(_style())[1:-1] in shown
