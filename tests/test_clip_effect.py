"""A clip that harms the steps that it clips is let go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.autoclip.effect import ClipEffect
from gradwatch.autoclip.limits import AutoClipLimits

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign


def follow(clipped: list[float], others: list[float]) -> ClipEffect:
    """Return the effect of a clip after these losses, taken in turns; a loss below 1.0 is well."""
    effect = ClipEffect(1.0, AutoClipLimits())
    for step in range(max(len(clipped), len(others))):
        for losses, bites in ((clipped, True), (others, False)):
            if step < len(losses):
                effect.take(losses[step], 7.0 if bites else 1.0, clipped=bites)
    return effect


def test_clipped_steps_are_unlearned_where_their_losses_stay_up_and_the_others_are_well() -> None:
    """Levels at first and of late; None where they come down or the others are not well."""
    up, down, well = [2.0, 3.0] * 8, [*[3.0] * 8, *[2.0] * 8], [0.1] * 16
    assert follow(up, well).unlearned == (2.5, 2.5)
    assert follow(up, well).largest_norm == 7.0
    assert follow([*up, math.nan], well).unlearned is not None
    assert follow(down, well).unlearned is None
    assert follow(up, [2.0] * 16).unlearned is None
    assert follow(up, []).unlearned is None
    assert follow(up[:15], well).unlearned is None
    assert follow([0.5] * 16, well).unlearned is None
    assert follow([*up, 3.0], well).unlearned is None, "what most steps carry is not rare"


class Always(gradwatch.Rule):
    """A rule that is wrong: from step 300 on it calls every large gradient an explosion."""

    code: ClassVar[str] = "MY001"
    name: ClassVar[str] = "wrong"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "diverging"
    per_layer: ClassVar[bool] = False
    limit: float = 3.0

    def measure(self, history: History) -> Floats:
        """Return the norm."""
        return np.array([history.row.global_norm * (history.row.step >= 300)])


def rare_class(clip: gradwatch.AutoClip | None) -> tuple[float, gradwatch.Monitor]:
    """Train a classifier with one positive in a hundred, which weighs as much as the rest; return its recall."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 8, generator=generator)
        return x, (x[:, :1] > 2.3263).float()

    rules = [*gradwatch.default_rules(), Always()]
    with gradwatch.attach(model, clip=clip, rules=rules, report=None, strict=True) as monitor:
        for _ in range(1200):
            x, y = batch(32)
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y, pos_weight=torch.tensor(99.0)).backward()
            optimizer.step()
    x, y = batch(20_000)
    return float((model(x)[y > 0] > 0).float().mean()), monitor


def test_a_clip_that_harms_a_rare_class_is_let_go_and_not_taken_up_again() -> None:
    """Though a wrong rule and a tiny bound would clip all of it away: recall as without, and the incident says so."""
    recall, _ = rare_class(None)
    spared, monitor = rare_class(gradwatch.AutoClip(gradwatch.ClipNorm(1.0), hold=5000))
    record = monitor.incidents[0].clip
    assert record is not None
    assert recall > 0.9
    assert spared > recall - 0.05
    assert "carry a rare signal" in str(record)
    # a still larger gradient switches it on again, but not at a bound that was found to do harm
    assert float((monitor.history.clip_coefficient(last=500) < 1.0).mean()) < 0.02


def recurrent(
    clip: gradwatch.AutoClip | str | None, outlier: int = -1, rate: float = 1e-2
) -> tuple[list[float], gradwatch.Monitor]:
    """Train a network under Adam to add up 30 numbers; the gradients of the step ``outlier`` are a million times as large."""
    torch.manual_seed(0)
    cell, head = nn.RNN(1, 32, nonlinearity="relu", batch_first=True), nn.Linear(32, 1)
    model = nn.ModuleList([cell, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
        for step in range(150):
            x = torch.randn(32, 30, 1)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(head(cell(x)[0][:, -1]), x.sum(1))
            loss.backward()
            for parameter in model.parameters() if step == outlier else ():
                parameter.grad.mul_(1e6)  # type: ignore[union-attr]
            optimizer.step()
            losses.append(loss.item())
    return losses, monitor


def test_adam_is_left_an_explosion_that_raised_the_loss() -> None:
    """Clipped, its loss goes to 2e6, since Adam steps on at full length where it sees no large gradient; unclipped, to 207."""
    alone, _ = recurrent(None)
    losses, monitor = recurrent("norm")
    assert losses == alone
    assert 100 < max(losses) < 400
    record = monitor.incidents[0].clip
    assert record is not None
    assert (record.clipped, record.helped) == (0, None)
    assert "not used from step 11 on: this optimizer divides gradients by their average size" in str(record)
    clipped, _ = recurrent(gradwatch.AutoClip(gradwatch.ClipNorm(1.0)))  # a bound of the user's
    assert max(clipped) > 100 * max(alone)


def test_under_adam_an_outlier_beside_a_usual_loss_is_clipped_alone() -> None:
    """As of a fault in a single step: Adam would make short steps for long after it."""
    alone, _ = recurrent(None, outlier=100, rate=3e-3)
    losses, monitor = recurrent("norm", outlier=100, rate=3e-3)
    record = monitor.incidents[0].clip
    assert record is not None
    assert np.flatnonzero(monitor.history.clip_coefficient() < 1).tolist() == [100]
    assert record.lifted_step == 101
    assert np.median(losses[-20:]) < np.median(alone[-20:]) / 10


def flipped(clip: str | None) -> tuple[list[float], gradwatch.Monitor]:
    """A classifier; one element of Adam's first moment becomes 1e30 at step 150, as a bit flip does it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
        for step in range(300):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
            loss.backward()
            if step == 150:
                moment = optimizer.state[model.get_parameter("2.weight")]["exp_avg"].view(-1)
                moment[moment.abs().argmax()] = -1e30
            optimizer.step()
            losses.append(loss.item())
    return losses, monitor


def test_adam_is_not_left_a_gradient_whose_square_is_infinite() -> None:
    """Its second moment would be infinite, and no weight would move again; smaller ones are left to it."""
    alone, _ = flipped(None)
    losses, monitor = flipped("norm")
    assert alone[-1] > 1e20
    assert losses[-1] < np.median(losses[100:150]) + 0.5
    record = monitor.incidents[0].clip
    assert record is not None
    assert record.norm_before > 1e20
    assert record.clipped > 1
    assert record.lifted_step is not None
