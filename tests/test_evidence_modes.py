"""What rules say is true in every mode: not finite, risen, resumed, measured now and then, in a warm-up."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.offline.replay import replay
from gradwatch.pipeline import Pipeline
from gradwatch.records import Alarm
from gradwatch.reports.notes import Notes
from gradwatch.reports.summary import Summary
from gradwatch.rules import default_rules, rule_by_code
from gradwatch.rules.notation import Case
from tests.trainings import mlp, train


def fires(rule: str, case: Case, **settings: Any) -> Alarm:
    """Return the first alarm of a rule on a written run."""
    history, rows = case.rows()
    found = replay(history, rows, [rule_by_code(rule)(**settings)]).alarms
    return next(alarm for alarm in found if alarm.state == "firing")


def test_a_loss_that_rose_is_not_where_it_began() -> None:
    """No traction has three forms: still there, above, and below by less than it varies."""
    above = fires("GW101", Case("", None, loss="4x20 53x300")).words
    assert above == "the loss was about 53 at step 271, above that of its first 16 steps (4)"
    still = fires("GW101", Case("", None, loss="2.3x300")).words
    assert (
        still
        == "the loss was still about 2.3 at step 271, as in its first 16 steps (2.3); below 2.25 would be progress"
    )
    noisy = " ".join(["3 2 1"] * 100)
    below = fires("GW101", Case("", None, loss=f"2.3x16 {noisy}")).words
    assert "below that of its first 16 steps (2.3), but by too little: below" in below


def test_losses_that_are_not_finite_are_left_out_and_counted() -> None:
    """The rest is where it began."""
    words = fires("GW101", Case("", None, loss="2.3x200 nanx20 2.3x80")).words
    assert re.search(r"\(it was finite in \d\d of the last 50 steps\)$", words)


@pytest.mark.parametrize(("loss", "word"), [("nan", "NaN"), ("inf", "infinite"), ("-inf", "minus infinity")])
def test_each_kind_of_loss_that_is_not_finite_has_its_word(loss: str, word: str) -> None:
    """None is a comparison with zero."""
    assert fires("GW103", Case("", None, loss=f"1x5 {loss}")).words == f"the loss was {word} at step 5"


def test_gradients_above_one_that_are_not_finite_are_called_so() -> None:
    """Not "above 1" where there was none."""
    finite = fires("GW203", Case("", None, grad={"a": "2x5", "b": "30x5"})).words
    assert finite.endswith(
        "layers with a gradient was above 1 at step 2, the last of 3 in a row, where the smallest was 2"
    )
    mixed = fires("GW203", Case("", None, grad={"a": "2 2 nan", "b": "3 3 inf"})).words
    assert "was above 1 or not finite at step 2" in mixed
    assert mixed.endswith("where none was finite")
    alone = fires("GW203", Case("", None, grad="2x5")).words
    assert alone.startswith("the gradient norm of the only layer with a gradient was")


def test_a_surge_of_two_steps_names_both() -> None:
    """With the limit that applies to two."""
    words = fires("GW301", Case("", None, grad="0.1x20 2 3 3")).words
    assert words.startswith(
        "the gradient norm of layer was 3 at step 21 and 2 at step 20, at least 18.7 times its usual 0.107"
    )
    assert words.endswith("(limit 10 for two steps)")


def test_an_infinite_weight_norm_is_no_number_of_times() -> None:
    """Neither growth nor update nor the long run has a factor then."""
    case = Case("", None, weight="2x20 inf", family="adam", rate=0.001)
    for code in ("GW201", "GW303", "GW304"):
        words = fires(code, case).words
        assert "infinity" in words
        assert "times" not in words


def test_a_rate_that_moves_by_its_size_is_named() -> None:
    """Half of what it moves is compared with the limit, so the limit in words is twice it."""
    words = fires("GW303", Case("", None, weight="5x5", rate=1.2, family="adam")).words
    assert (
        words
        == "the learning rate of 1.2 was to move layer by about 12 at step 0, 2.4 times the norm of its weights (5; limit 2)"
    )


def test_a_new_task_is_where_its_layers_came() -> None:
    """The loss "began" when a head was added."""

    class Grown:
        names: ClassVar = ("a", "b")
        sizes: ClassVar = (100, 100)
        matrices: ClassVar = (True, True)
        fan_in: ClassVar = (10, 10)

    history, rows = Case("", None, loss="9x40").rows()
    for row in rows:
        history.push(row)
    history.grow(Grown())
    rule = rule_by_code("GW101")()
    for row in Case("", None, grad={"a": "1x300", "b": "1x300"}, loss="2.3x300").rows()[1]:
        history.push(row._replace(step=row.step + 40))
    alarm = Alarm("GW101", "no traction", "subtle", "stalled", None, 339, 2.0, 1.0, numbers=rule.numbers(history, 0))
    assert "as in its first 16 steps of the new task (2.3)" in rule.sentence(alarm)


def test_measured_steps_are_called_so() -> None:
    """With ``every=10`` a clip that never bites was seen in a tenth of the steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)

    rule = rule_by_code("GW502")(limit=70.0)
    with gradwatch.attach(model, report=None, every=10, rules=[rule], strict=True) as monitor:
        train(model, optimizer, 1200, each=clip)
    (note,) = monitor.notes
    assert "measured steps at step" in note


def test_clip_signs_wait_for_the_end_of_the_warm_up_and_for_the_loss() -> None:
    """The usual recipe of a language model: norm 1.0, warm-up, a loss that falls."""
    torch.manual_seed(0)
    tokens = torch.randint(4, (4000,)).cumsum(0) % 32
    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 150))
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(500):
            at = torch.randint(len(tokens) - 1, (64,))
            optimizer.zero_grad()
            (100 * nn.functional.cross_entropy(model(tokens[at]), tokens[at + 1])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
    assert (monitor.history.clip_coefficient(last=400) < 1).mean() > 0.8
    assert monitor.notes == []


def test_a_clip_sign_is_told_once() -> None:
    """Also if it fires, rests and fires again, and not a second time as a sign without an incident."""
    clip = " ".join(["0.1x150 1x150"] * 3)
    case = Case("", None, clip=clip, loss="1x900")
    history, rows = case.rows()
    pipeline = Pipeline(history, default_rules(), None, [], Notes(strict=True))
    times = 0
    for row in rows:
        pipeline.judge(row)
        times += sum(a.code == "GW501" and a.state == "firing" and a.step == row.step for a in pipeline.changes)
    assert times > 1
    assert sum("GW501" in note for note in pipeline.notes.all) == 1
    assert str(Summary(pipeline.snapshot())).count("GW501") == 1
