"""Published and written traces through the whole pipeline, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gradwatch
from gradwatch.__main__ import main
from gradwatch.offline.replay import Replayed, replay, with_settings
from gradwatch.offline.traces import parse_trace, read_trace
from gradwatch.rules import default_rules

if TYPE_CHECKING:
    from gradwatch.rules.notation import Case

TRACES = Path(__file__).parent / "traces"


def replayed(case: Case, *settings: str) -> Replayed:
    """Judge a written run with the default rules, some of them set otherwise."""
    history, rows = case.rows()
    return replay(history, rows, *with_settings(default_rules(), settings))


def test_the_published_spike_of_bloom_is_told_before_its_loss_jumps() -> None:
    """The loss jumps on the last row; the gradient norm has left its band rows before."""
    found = replayed(read_trace(TRACES / "bloom-176b.txt"))
    (incident,) = found.incidents
    assert found.rows == 26
    assert (incident.kind, incident.severity) == ("exploding", "critical")
    assert incident.opened_step < found.rows - 1
    assert any("gradients become 3.4 times as large with each step" in line for line in incident.evidence)


def test_other_thresholds_say_what_would_have_fired() -> None:
    """A surge asked to be a thousand times leaves the spike to the loss's own jump."""
    found = replayed(read_trace(TRACES / "bloom-176b.txt"), "GW301.limit=1000")
    assert [incident.kind for incident in found.incidents] == ["spike"]
    assert {alarm.code for alarm in found.alarms} == {"GW102", "GW203"}


def test_the_command_line_judges_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """What fired, which incident, and why; nothing stands under "then", for nothing was recorded."""
    assert main(["replay", str(TRACES / "bloom-176b.txt")]) == 0
    said = capsys.readouterr().out
    assert "26 rows judged" in said
    assert "exploding confirmed (critical), step 24" in said
    assert "gradients become 3.4 times as large with each step" in said
    assert "then" not in said
    assert main(["replay", str(TRACES / "bloom-176b.txt"), "--rule", "GW301.limit=1000"]) == 0
    assert "spike" in capsys.readouterr().out


def test_a_trace_reads_as_its_lines_say() -> None:
    """Layers, optimizer, rate, and a comment that is none of it."""
    case = parse_trace(
        "optimizer sgd  # plain\nrate 0.5\nelements 64\nloss 1x3\ngradient a 1 2\ngradient b 3\nweight a 7"
    )
    assert (case.family, case.rate, case.size) == ("sgd", 0.5, 64)
    assert case.grad == {"a": "1 2", "b": "3"}
    assert case.weight == {"a": "7", "b": "1"}
    history, rows = case.rows()
    assert history.layers == ("a", "b")
    assert [row.grad_norm.tolist() for row in rows] == [[1, 3], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gradients a 1", "line 1: 'gradients' is not a word of a trace. Did you mean 'gradient'?"),
        ("loss 1x3\ngradient a 1y3", "line 2: '1y3' is not a series"),
        ("optimizer lion", "line 1: optimizer 'lion' is not one of sgd, adam, other"),
        ("gradient a", "line 1: a series of at least one value is missing"),
        ("loss 1x0\ngradient a 1", "line 1: a series of at least one value is missing"),
        ("gradient a 1\ngradient\ta 2", "line 2: the gradient of 'a' is given twice"),
        ("elements 0", "line 1: a layer of 0 elements is not valid"),
        ("rate nan", "line 1: a rate of nan is not valid"),
        ("rate fast", "line 1: could not convert string to float"),
        ("loss 1 2 3", "nothing to replay"),
        ("gradient a 1\nweight b 1", "weights of 'b' but no gradients of it"),
    ],
)
def test_a_line_that_is_none_is_named_with_its_number(text: str, message: str) -> None:
    """What happened, the value, what was expected."""
    with pytest.raises(gradwatch.UsageError, match=message.replace("?", r"\?")):
        parse_trace(text)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    """Missing, or not text at all."""
    with pytest.raises(gradwatch.UsageError, match="cannot be read as text"):
        read_trace(tmp_path / "none.txt")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    with pytest.raises(gradwatch.UsageError, match="cannot be read as text"):
        read_trace(tmp_path / "bytes")


def test_growth_beyond_all_numbers_is_infinite() -> None:
    """A series that doubles for two thousand steps, through every rule."""
    found = replayed(parse_trace("loss 1x20 1*2x2000\ngradient a 1x20 1*2x2000\nweight a 1"))
    assert found.rows == 2020
    assert found.incidents[0].kind == "exploding"
    assert {"GW103", "GW302"} <= {alarm.code for alarm in found.alarms}
