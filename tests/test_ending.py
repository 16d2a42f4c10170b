"""How the loss stands at the end: a sentence where it is nothing to be content with, and none elsewhere."""

from __future__ import annotations

import re

import pytest
import torch

import gradwatch
from gradwatch.history.ending import how_it_stands, not_learned
from gradwatch.rules.notation import Case
from tests.trainings import mlp, train


def said(loss: str, grad: str = "1", *, resting: bool = False) -> str:
    """What is said after these losses and gradient norms."""
    history, rows = Case("a run", None, grad=grad, loss=loss).rows()
    if resting:
        history.rest_loss("it is adversarial")
    for row in rows:
        history.push(row)
        history.learn()
    return how_it_stands(history)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("2.3x150", "is 2.3 (median of 32 losses), at the level at which it began (2.3)"),
        ("2.3x100 5x50", "is 5 (median of 32 losses), above the level at which it began (2.3)"),
        ("2*0.99x100 0.75+0.002x300", "is 1.32 (median of 32 losses), above its best level of 0.787 about step 119"),
        (
            "2.5*0.98x9 2.12x391",
            "is 2.12 (median of 32 losses) and has hardly fallen since step 135 (2.15 in its first 16 steps)",
        ),
        ("1x20 nanx30", "is NaN, and has not been finite since step 20"),
        ("1x200 nan", "is NaN in the last step, 200"),
    ],
)
def test_a_loss_that_stands_badly_is_told_with_its_levels(loss: str, words: str) -> None:
    """Each with the step since which it is so."""
    assert said(loss).startswith(words)


@pytest.mark.parametrize(
    "loss", ["2*0.99x400", "2*0.98x100 0.27x300", "2.3x50", "2.5*0.98x9 2.12x150", "2*0.99x100 0.75 0.9 0.75 0.9x200"]
)
def test_a_loss_that_falls_or_has_fallen_far_needs_no_sentence(loss: str) -> None:
    """Nor one of a run that is too short, or whose way back up is small."""
    assert said(loss) == ""


def test_a_loss_that_has_risen_is_not_said_to_have_hardly_fallen() -> None:
    """It was lower once, and that level is named."""
    history, rows = Case("a run", None, grad="1", loss="2.6 0.46x15 0.02*1.012x384").rows()
    for row in rows:
        history.push(row)
        history.learn()
    assert not_learned(history) == "is 1.6 (median of 32 losses), above its best level of 0.0244 about step 17"


def test_a_loss_that_need_not_fall_is_not_measured_by_its_past() -> None:
    """Only NaN is told, and gradients that are all zero."""
    assert said("2.3x150", resting=True) == ""
    assert said("1x20 nanx30", resting=True) == "is NaN, and has not been finite since step 20"
    assert (
        said("2*0.99x200", grad="1x100 0x100")
        == "is 0.316 (median of 32 losses), and every gradient has been zero since step 136 or before"
    )


def test_the_summary_says_it_beside_healthy() -> None:
    """A weight decay that outweighs the loss: nothing explodes, and a part of what was learned is lost again."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 200)
        optimizer.param_groups[0]["weight_decay"] = 8.0
        train(model, optimizer, 300)
        assert monitor.verdict == "healthy"
        assert re.search(r"the loss is [0-9.]+ \(median of 32 losses\), above ", str(monitor.summary()))


def test_a_classifier_that_falls_to_guessing_is_said_to_be_no_better() -> None:
    """It begins at ten times that, since its weights are large, and its labels are noise."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 5)
    with torch.no_grad():
        model.weight.mul_(30)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(500):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.randn(64, 8)), torch.randint(5, (64,))).backward()
            optimizer.step()
    assert monitor.history.first_loss > 5
    assert re.search(
        r"the loss is 1\.6\d* .*, no better than guessing among 5 classes \(1\.61\)", str(monitor.summary())
    )
