"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.__main__ import main
from gradwatch.rules import RULES
from gradwatch.verdict.settings import VerdictSettings
from tests import terminal


def test_rules_lists_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Code and name of each, and what it fires on."""
    assert main(["rules"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for rule in RULES:
        assert rule.code in text


def test_rules_as_json_is_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """Codes, signs and default settings."""
    assert main(["rules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["code"] for row in rows] == [rule.code for rule in RULES]
    assert next(row for row in rows if row["code"] == "GW203")["settings"]["limit"] == 1.0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_explain_prints_a_rules_page(rule: type, capsys: pytest.CaptureFixture[str]) -> None:
    """Every heading, in plain text when it is piped."""
    assert main(["explain", rule.code.lower()]) == 0  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert rule.code in out  # type: ignore[attr-defined]
    assert "When it is harmless" in out
    assert "\x1b" not in out


def test_explain_prints_the_verdicts_page(capsys: pytest.CaptureFixture[str]) -> None:
    """With each of its limits and what it is by default."""
    assert main(["explain", "verdict"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} = {field.default}" in said for name, field in VerdictSettings.model_fields.items())


def test_an_unknown_code_ends_with_two_and_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, without a traceback."""
    assert main(["explain", "GW20"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gradwatch: There is no rule 'GW20'. Did you mean 'GW20")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["demo", "--epochs", "0"], "expected an integer from 1 to 1000000, got '0'"),
        (["demo", "--epochs", "1.5"], "expected an integer from 1 to 1000000, got '1.5'"),
        (["demo", "--seed", "99999999999999999999999"], "expected an integer from 0 to"),
        (["demo", "--seed", "-1"], "got '-1'"),
        (["report", ""], "the path is empty"),
        (["report", "run", "--html", ""], "the path is empty"),
        (["export", "run", "--to", "csv", "--out", ""], "the path is empty"),
        (["compare", "run", ""], "the path is empty"),
        (["list", ""], "the path is empty"),
        (["list", "x" * 300], "cannot be read: File name too long. Give a folder"),
        (["report", "x" * 300], "cannot be read: [Errno 36] File name too long"),
        (["watch", ""], "the path is empty"),
        (["replay", ""], "the path is empty"),
        (["suggest", ""], "the path is empty"),
    ],
)
def test_a_value_that_is_none_is_told_as_bad_usage(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2, without a traceback, before anything is done."""
    try:
        code = main(typed)
    except SystemExit as end:
        code = int(str(end.code))
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "typed",
    [
        ["report", "a", "b{}"],
        ["report", "--unknown{}", "a"],
        ["rules", "--{}"],
        ["report", "a", "--h={}"],
        ["report", "a", "--json={}"],
        ["{}"],
        ["export", "a", "--to", "{}"],
        ["demo", "--epochs", "{}"],
        ["report", "{}"],
        ["list", "{}"],
        ["explain", "{}"],
        ["replay", "a{}", "--rule", "{}"],
        ["compare", "{}", "{}"],
        ["export", "a", "--to", "csv", "--out{}", "x"],
    ],
    ids=" ".join,
)
def test_what_was_typed_steers_no_terminal_when_it_is_repeated(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters in unknown options, choices, values and paths are spelled; the exit code is 2."""
    try:
        code = main([word.format("\x1b[31mx\x07\r\u202e\x9b2J\nforged") for word in typed])
    except SystemExit as end:
        code = int(str(end.code))
    said = capsys.readouterr()
    assert code == 2
    assert "\\x1b[31mx" in said.err
    assert not set("\x1b\x07\r\u202e\x9b") & set(said.out + said.err)
    assert "\nforged" not in said.out + said.err


def test_the_module_is_the_same_command() -> None:
    """`python -m gradwatch --help` shows the examples and exit codes."""
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert "gradwatch explain GW203" in done.stdout
    assert "exit codes" in done.stdout


def test_the_demo_shows_both_trainings_live_and_side_by_side() -> None:
    """In a real terminal: the picture while it trains, then two summaries and one table."""
    session = terminal.run(
        "import torch, sys; torch.set_num_threads(1)\n"
        "from gradwatch.__main__ import main; sys.exit(main(['demo', '--epochs', '40']))"
    )
    assert session.code == 0
    assert any("of limit" in line for screen in session.screens for line in screen)
    text = session.everything
    assert text.count("exploding confirmed (critical)") == 2
    table = text[text.index("The same training, twice") :].splitlines()
    watched = next(line for line in table if "watched only" in line)
    clipped = next(line for line in table if 'clip="norm"' in line)
    assert "nan" in watched
    assert "at step" in watched
    assert "never" in clipped
    assert "nan" not in clipped
