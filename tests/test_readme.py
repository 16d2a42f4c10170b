"""The README's words are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch.rules import RULES
from tests.trainings import mlp, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page: (ROOT / page).read_text() for page in ("docs/quick-start.md", "docs/reading.md", "docs/auto-clip.md")}


def test_every_rule_stands_in_the_table_with_its_sign() -> None:
    """And no other."""
    rows = dict(re.findall(r"^\| (GW\d+) \| (\w+) \|", PAGES["docs/reading.md"], re.MULTILINE))
    assert rows == {rule.code: rule.sign for rule in RULES}
    assert f"lists the {len(RULES)} that are\nthere" in README


def test_the_readme_is_read_in_five_minutes() -> None:
    """It has at most 1,200 words; the rest is in the docs."""
    assert len(README.split()) <= 1200


def test_figures_stand_in_the_tables_that_commands_write() -> None:
    """The README repeats them in sentences, so they must be those of the pages that it links to."""
    detection = (ROOT / "docs/detection.md").read_text()
    recall = re.search(r"\| recall, all faulty runs .* (\d+) % \([^|]*\|\n", detection)
    alarms = re.search(r"\| healthy runs with a false alarm .* (\d+) % \([^|]*\|\n", detection)
    repaired = re.search(r"\| auto-clip \| .*?\((\d+)/(\d+)\).*?\((\d+)/(\d+)\)", (ROOT / "docs/repair.md").read_text())
    cost = re.search(r"\| step / step with `clip_grad_norm_` \|(.*)\|\n", (ROOT / "docs/performance.md").read_text())
    assert recall is not None
    assert alarms is not None
    assert repaired is not None
    assert cost is not None
    words = " ".join(README.split())
    assert f"{recall[1]} % of faulty runs get an alarm, and {alarms[1]} % of healthy ones" in words
    one, of_one, other, of_other = map(int, repaired.groups())
    assert f"repairs {one + other} of the {of_one + of_other} runs that always clipping repairs" in words
    programs = re.search(r"of the (\d+) programs that always clipping repairs", (ROOT / "docs/repair.md").read_text())
    assert programs is not None
    limits = " ".join((ROOT / "docs/limits.md").read_text().split())
    assert f"always clipping repairs {programs[1]}; the shares" in limits
    short, *others = (100 * float(cell.split()[0]) - 100 for cell in cost[1].split("|"))
    assert f"takes {min(others):.1f} to {max(others):.1f} % longer than one with a `clip_grad_norm_`" in words
    assert f"and {short:.0f} % on the sixth" in words


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_the_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with a model and a training that the reader has, in a folder of its own."""
    import torch

    import gradwatch

    monkeypatch.chdir(tmp_path)
    model = mlp()

    def train_it() -> None:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)

    names = {"model": model, "train": train_it, "gradwatch": gradwatch}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        for line in re.split(r"(?m)^(?=gradwatch\.attach)", block):
            code = (
                line.replace("gradwatch.attach(model", "gradwatch.attach(model, report=None")
                if "attach" in line
                else line
            )
            exec(compile(code, "README.md", "exec"), names)  # noqa: S102  the README is ours
            for monitor in list(gradwatch.monitor.attached.values()):
                monitor.detach()


def test_the_first_screen_has_two_single_line_commands() -> None:
    """One runs the demo, one the tests; both under the constraints."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("gradwatch demo")
    assert "pytest" in commands[1]
    assert all("-c .ci/constraints.txt" in command for command in commands)
    assert README[: README.index(commands[1])].count("\n") < 32


def test_nothing_in_the_repository_names_a_path_of_a_machine_or_a_registry() -> None:
    """Installing works wherever pip is set up."""
    texts = [README, *(path.read_text() for path in (ROOT / ".ci").iterdir()), (ROOT / "pyproject.toml").read_text()]
    for text in texts:
        assert not re.search(r"/home/|/root/|index-url|find-links|https?://\S*(pypi|pythonhosted)", text)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    """Whoever follows it finds them."""
    named = set(re.findall(r"[`\s]((?:[a-z_]+/)*[a-z_]+\.py)`", (ROOT / page).read_text()))
    assert len(named) > 15
    places = (ROOT, ROOT / "gradwatch", ROOT / "tests")
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
