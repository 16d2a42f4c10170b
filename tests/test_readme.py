"""The README's words are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch.rules import RULES
from tests.trainings import mlp, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_rule_stands_in_the_table_with_its_sign() -> None:
    """And no other."""
    rows = dict(re.findall(r"^\| (GW\d+) \| (\w+) \|", README, re.MULTILINE))
    assert rows == {rule.code: rule.sign for rule in RULES}


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with a model and a training that the reader has, in a folder of its own."""
    import torch

    import gradwatch

    monkeypatch.chdir(tmp_path)
    model = mlp()

    def train_it() -> None:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)

    names = {"model": model, "train": train_it}
    for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
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
