"""The report page, looked at in a browser."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.__main__ import main
from gradwatch.history.history import History
from gradwatch.page.content import cells_of, line_of
from gradwatch.pipeline import Pipeline
from gradwatch.records import Provenance, Row
from gradwatch.reports.notes import Notes
from gradwatch.rules import default_rules
from gradwatch.runlog import RunLog
from gradwatch.runlog.environment import environment_of
from gradwatch.runlog.recording import Recording, columns_of
from gradwatch.runlog.store import Store
from gradwatch.text.extras import install_command
from tests.browser import needs_browser, page
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from pathlib import Path

    from selenium.webdriver.chrome.webdriver import WebDriver

EVIL = '<img src=x onerror="harmed=1"><b>bold<'


def run_of(folder: Path, rows: int, layers: int) -> Path:
    """Log a run whose layers explode one after the other from step 6/10 on."""
    history = History([f"blocks.{n}.mlp.up.weight" for n in range(layers)])
    rules = default_rules()
    pipeline = Pipeline(history, rules, None, [], Notes(strict=True))
    pipeline.desk.keep(
        Recording(Store(folder, columns_of(history), environment_of(rules, None), history.facts), history, _fail)
    )
    pipeline.desk.start()
    random = np.random.default_rng(0)
    typical = np.exp(random.normal(-2, 1, layers))
    begin = rows * 6 // 10
    for step in range(rows):
        norms = typical * np.exp(random.normal(0, 0.2, layers))
        loss = 2.0 + random.normal(0, 0.02)
        if begin <= step < begin + 30:
            norms *= np.exp(np.clip((step - begin) * layers / 10 - np.arange(layers)[::-1], 0, 7))
            loss += step - begin
        weights = np.ones(layers) if (step + 1) % 32 == 0 else None
        seen = Provenance("written", loss="written")
        norm = float(np.linalg.norm(norms))
        row = Row(step, loss, norms, norm, weights, rate=np.full(layers, 0.1), provenance=seen)
        pipeline.done(row, pipeline.judge(row), 1.0)
        if step % 256 == 0:
            assert pipeline.desk.log is not None
            pipeline.desk.log.flush(10.0)
    pipeline.desk.close()
    return folder


def _fail(*told: object) -> None:
    raise AssertionError(told)


@pytest.fixture(scope="module")
def exploding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 1,000 steps and 12 layers that explodes at step 600."""
    folder = tmp_path_factory.mktemp("page")
    run_of(folder / "run", 1000, 12)
    assert main(["report", str(folder / "run"), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def script(driver: WebDriver, text: str, *arguments: object) -> Any:
    """Run a piece of JavaScript in the page."""
    return driver.execute_script(text, *arguments)


def visible(driver: WebDriver) -> str:
    """Return the text that a person sees, as one line."""
    return " ".join(str(script(driver, "return document.body.innerText")).split())


# the colour of a heat map's cell, by step and layer, as it is drawn
CELL = """
const [trace, step, layer, done] = arguments;
const picture = document.getElementById("picture"), axes = picture._fullLayout;
const image = picture.querySelectorAll(".hm image")[trace];
const loaded = new Image();
loaded.onload = () => {
  const canvas = document.createElement("canvas");
  canvas.width = loaded.width; canvas.height = loaded.height;
  const drawn = canvas.getContext("2d");
  drawn.drawImage(loaded, 0, 0);
  const data = picture._fullData.filter((one) => one.type === "heatmap")[trace];
  const x = (step - data.x0 + data.dx / 2) / data.dx / data.z[0].length, y = (layer + 0.5) / data.z.length;
  done(Array.from(drawn.getImageData(Math.floor(x * loaded.width), Math.floor(y * loaded.height), 1, 1).data));
};
loaded.src = image.getAttribute("href") || image.getAttribute("xlink:href");
"""


def colour(driver: WebDriver, trace: int, step: int, layer: int) -> np.ndarray[Any, Any]:
    """Return red, green and blue of a cell of the heat map."""
    return np.array(driver.execute_async_script(CELL, trace, step, layer)[:3], dtype=float)


@needs_browser
def test_the_page_shows_the_run(exploding: Path) -> None:
    """Verdict, figures, all panels, the incident's story with its advice, the environment; nothing is fetched."""
    with RunLog(exploding.parent / "run") as log:
        incident = next(one for one in log.incidents if one.kind == "exploding")
    with page(exploding) as driver:
        text = visible(driver)
        assert driver.title == "run · gradwatch"
        for words in (
            "resolved",
            "12 layers",
            "steps 1,000",
            "loss",
            "global gradient norm",
            "gradient norm of each layer",
        ):
            assert words in text
        assert str(incident) in text
        for line in (*incident.evidence, *incident.advice):
            assert " ".join(line.split()) in text
        assert " → ".join(incident.layers[:12]) in text
        assert f"torch {torch.__version__}" in text
        assert f"{len(default_rules())} rules and their thresholds" in text
        panels = script(
            driver, "return Array.from(document.querySelectorAll('.hm image'), (i) => i.getBoundingClientRect().width)"
        )
        assert len(panels) == 2
        assert min(panels) > 800
        assert script(driver, "return performance.getEntriesByType('resource').length") == 0
        assert [one for one in driver.get_log("browser") if one["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]
        assert script(driver, "return document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_a_schedule_and_a_loss_scale_have_panels(tmp_path: Path) -> None:
    """Under the clip coefficient, with the numbers of each step; a rate that never changes takes no room."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=20)
    x, y = data()
    for name, steps in (("still", 40), ("changing", 60)):
        with gradwatch.attach(model, report=None, log=tmp_path / name):
            for _ in range(steps):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), y)
                if name == "still":
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    schedule.step()
        assert main(["report", str(tmp_path / name), "--html", str(tmp_path / f"{name}.html")]) == 0
    with page(tmp_path / "still.html") as driver:
        assert "learning rate" not in visible(driver)
        assert "loss scale" not in visible(driver)
    with page(tmp_path / "changing.html") as driver:
        text = visible(driver)
        assert "learning rate" in text
        assert "loss scale 1024" in text
        lines = script(
            driver, "return Object.fromEntries(document.getElementById('picture').data.map((one) => [one.name, one.y]))"
        )
    with RunLog(tmp_path / "changing") as log:
        assert lines["learning rate"] == pytest.approx(log.series().learning_rate, rel=1e-5)
        assert lines["loss scale"] == log.series().loss_scale.tolist()


@needs_browser
def test_the_explosion_is_seen_to_start_in_the_heat_map(exploding: Path) -> None:
    """The last layer changes its colour before the first one does."""
    with page(exploding) as driver:
        calm, late = (colour(driver, 0, 300, layer) for layer in (11, 0))
        assert np.abs(colour(driver, 0, 620, 11) - calm).max() > 60
        assert np.abs(colour(driver, 0, 620, 0) - late).max() > 60
        assert np.abs(colour(driver, 0, 603, 0) - late).max() < np.abs(colour(driver, 0, 603, 11) - calm).max()


@needs_browser
def test_the_page_answers(exploding: Path) -> None:
    """To its buttons, and to the mouse over the heat map."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    with page(exploding) as driver:
        before = script(driver, "return getComputedStyle(document.body).backgroundColor")
        driver.find_element(By.ID, "theme").click()
        assert script(driver, "return getComputedStyle(document.body).backgroundColor") != before
        driver.find_element(By.ID, "relative").click()
        assert "× 10" in visible(driver)
        heat = driver.find_elements(By.CSS_SELECTOR, ".hm image")[0]
        script(driver, "arguments[0].scrollIntoView({block: 'center'})", heat)
        plot = driver.find_elements(By.CSS_SELECTOR, ".nsewdrag")[2]
        ActionChains(driver).move_to_element(plot).pause(0.3).perform()
        tip = driver.find_element(By.ID, "tip")
        assert tip.is_displayed()
        assert re.search(r"blocks\.\d+\.mlp\.up\.weight\nsteps? .*\ngradient norm [\d.]+ · median", tip.text)
        driver.find_elements(By.CSS_SELECTOR, "article button")[-1].click()
        low, high = script(driver, "return document.getElementById('picture').layout.xaxis.range")
        assert low < 601 < high < 1000
        driver.find_element(By.TAG_NAME, "summary").click()
        assert "GW301 gradient norm surges" in visible(driver)


@needs_browser
def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    """A layer whose name is markup is text in the ticks, in the stories and in the title."""
    model = torch.nn.Sequential()
    model.add_module(EVIL, torch.nn.Linear(8, 8))
    model.add_module("out</script>", torch.nn.Linear(8, 1))
    with gradwatch.attach(model, report=None, log=tmp_path / "<i>run<") as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=1e6), 40)
    assert monitor.incidents
    assert main(["report", str(tmp_path / "<i>run<"), "--html", str(tmp_path / "page.html")]) == 0
    with page(tmp_path / "page.html") as driver:
        assert script(driver, "return window.harmed === undefined && document.querySelectorAll('img').length === 0")
        text = visible(driver)
        assert f"{EVIL}.weight" in text
        assert "out</script>.weight" in text
        assert driver.title == "<i>run< · gradwatch"
        ticks = script(
            driver, "return Array.from(document.querySelectorAll('[class$=tick] text'), (one) => one.textContent)"
        )
        assert any("</script>.weight" in tick for tick in ticks)


def test_a_page_of_300_layers_and_10_000_steps_is_below_six_megabytes(tmp_path: Path) -> None:
    """And needs nothing but itself."""
    run_of(tmp_path / "run", 10_000, 300)
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    written = (tmp_path / "page.html").read_bytes()
    assert len(written) < 6e6
    own = written.decode().split("</style>")[0] + written.decode().rpartition("<script>")[2]
    assert "http" not in own.replace('http-equiv="Content-Security-Policy"', "")


def test_a_spike_of_one_step_stays_in_a_line_of_many() -> None:
    """Each stretch is drawn from its smallest to its largest value."""
    values = np.ones(100_000)
    values[54_321] = 1e6
    values[70_000:70_010] = np.nan
    line = line_of(np.arange(100_000), values)
    assert len(line["x"]) <= 2400
    assert line["y"][line["x"].index(54_321)] == 1e6
    assert line["bad"] == [69_999]
    assert line["x"] == sorted(line["x"])


def test_a_cell_of_the_heat_map_is_the_largest_norm_of_its_steps() -> None:
    """Against a plain loop; missing ones are -32768."""
    import base64

    random = np.random.default_rng(0)
    steps = np.arange(0, 5000, 2)
    norms = np.exp(random.normal(0, 3, (2500, 4))).astype(np.float32)
    norms[:, 3] = np.nan
    norms[:, 2] = 0.0
    part = cells_of(steps, norms, 100, [(1000, np.array([1, 0, 0, 0], dtype=np.uint8))])
    assert part is not None
    cells = np.frombuffer(base64.b64decode(part["cells"]), dtype="<i2").reshape(4, 100)
    for column, middle in enumerate(part["x"]):
        there = np.abs(steps - middle) <= part["width"] / 2
        assert there.sum() == 25
        for layer in (0, 1):
            assert cells[layer, column] == round(700 * np.log10(float(norms[there, layer].max())))
    assert (cells[2] == -32200).all()
    assert (cells[3] == -32768).all()
    broken = np.unpackbits(np.frombuffer(base64.b64decode(part["broken"]), dtype=np.uint8).reshape(4, -1), axis=1)
    assert np.argwhere(broken).tolist() == [[0, 20]]


def test_a_cell_holds_any_norm() -> None:
    """From the smallest float32 to the largest, to half a per cent: what explodes to 1e35 is no small number."""
    import base64

    norms = np.array([[1e-45, 1e-39, 1e-33, 1.0, 1e33, 1e36, 3.4e38, np.inf]], dtype=np.float32)
    part = cells_of(np.array([0]), norms, 100)
    assert part is not None
    cells = np.frombuffer(base64.b64decode(part["cells"]), dtype="<i2") / 700
    expected = np.log10(np.minimum(norms[0], np.finfo(np.float32).max).astype(np.float64))
    np.testing.assert_allclose(cells, expected, atol=0.003)
    assert cells.min() > -46


def test_steps_in_any_order_are_drawn_at_their_place() -> None:
    """As a log may hold them that was damaged or put together from others."""
    random = np.random.default_rng(0)
    steps, norms = np.arange(0, 300, 3), np.exp(random.normal(0, 1, (100, 3))).astype(np.float32)
    order = random.permutation(100)
    for most in (600, 20):
        assert cells_of(steps[order], norms[order], most) == cells_of(steps, norms, most)
        assert cells_of(steps[::-1], norms[::-1], most) == cells_of(steps, norms, most)
    twice = cells_of(np.concatenate([steps, steps]), np.concatenate([norms / 2, norms]), 600)
    assert twice == cells_of(steps, norms, 600)


def test_without_plotly_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra, in one line; exit code 2."""
    run_of(tmp_path / "run", 40, 3)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 2
    assert install_command("report") in capsys.readouterr().err
