"""What each rule says of a real training, compared with numbers computed from the run's rows."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gradwatch.rules import RULES
from tests.test_rule_trainings import TRAININGS, watched
from tests.trainings import mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    import gradwatch
    from gradwatch.records import Floats


def units_die() -> gradwatch.Monitor:
    """Biases that put three of four hidden units below zero."""
    model = mlp(depth=2)
    with torch.no_grad():
        model[0].bias[:12] = -100.0  # type: ignore[operator]
    return watched(model, torch.optim.SGD(model.parameters(), lr=0.01), 80)


@cache
def run(name: str) -> gradwatch.Monitor:
    """Return the faulty training of a rule."""
    return TRAININGS[name](True)


class Told:
    """The first alarm of a rule in a run, and what is known of that run until then."""

    def __init__(self, code: str, monitor: gradwatch.Monitor) -> None:
        self.alarm = next(a for a in monitor.alarms if a.code == code and a.state == "firing")
        self.words, self.step, history = self.alarm.sentence, self.alarm.step, monitor.history
        upto = history.steps() <= self.step
        self.loss, self.norm = history.loss()[upto], history.global_norm()[upto]
        self.left = history.clip_coefficient()[upto]
        layer = history.layers.index(self.alarm.layer) if self.alarm.layer else 0
        self.gradient, self.weight = history.grad_norm()[upto], history.weight_norm()[upto]
        self.own, self.own_weight = self.gradient[:, layer], self.weight[:, layer]
        self.size, self.fan_in = history.sizes[layer], history.fan_in[layer]

    def say(self, *values: float | str, digits: int = 2) -> None:
        """Assert that the sentence names these numbers in this order, with at least ``digits`` right digits, and these words."""
        rest = self.words
        for value in values:
            if isinstance(value, str):
                assert value in rest, (value, self.words)
                rest = rest.partition(value)[2]
                continue
            found = [(m, float(m[0].replace(",", ""))) for m in re.finditer(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?", rest)]
            hit = next((m for m, x in found if math.isclose(x, value, rel_tol=0.5 * 10 ** (1 - digits))), None)
            assert hit is not None, (value, self.words)
            rest = rest[hit.end() :]


def middle(values: Floats) -> float:
    """Return the median of the finite values."""
    return float(np.median(values[np.isfinite(values)]))


def check_no_traction(told: Told) -> None:
    """Both levels."""
    told.say(middle(told.loss[-50:]), told.step, "its first 16 steps", middle(told.loss[:16]), "would be progress")


def check_loss_jump(told: Told) -> None:
    """From where to where."""
    told.say("jumped to", told.loss[-1], told.step, middle(told.loss[-33:-1]), "above")


def check_loss_nonfinite(told: Told) -> None:
    """Infinity from the first step on."""
    assert told.loss[-1] == math.inf
    assert told.words == f"the loss was infinite at step {told.step}"


def check_loss_runaway(told: Told) -> None:
    """The level, the beginning, and the limit of a run downwards."""
    level, largest = middle(told.loss[-8:]), float(np.abs(told.loss[:16]).max())
    told.say("ran down to", level, told.step, abs(level) / largest, largest, 100.0)


def check_stays_up(told: Told) -> None:
    """Both levels, and the step between."""
    assert 140 < np.argmax(told.loss[140:] > 0.01) + 140 <= 151
    told.say(middle(told.loss[-64:]), "since about step 151", told.step, middle(told.loss[-128:151]))


def check_learning_lost(told: Told) -> None:
    """The level now, that of the beginning, and the best one with its step."""
    best = min(middle(part) for part in np.array_split(told.loss[:-64], len(told.loss[:-64]) // 32))
    told.say(middle(told.loss[-64:]), told.step, middle(told.loss[:16]), best)
    assert 64 < float(told.alarm.numbers["best at"]) < 110


def check_weight_growth(told: Told) -> None:
    """In the second row, the usual norm is the first."""
    told.say(told.alarm.layer or "", told.own_weight[-1], told.step, told.own_weight[-1] / told.own_weight[0], 5.0)


def check_weight_nonfinite(told: Told) -> None:
    """The norm that was seen."""
    assert math.isnan(told.own_weight[-1])
    told.say(told.alarm.layer or "", "held NaN", told.step)


def check_above_one(told: Told) -> None:
    """How many layers, and the smallest norm."""
    told.say(told.gradient.shape[1], "above 1 at step", told.step, "last of 3", told.gradient[-1].min())


def check_surge(told: Told) -> None:
    """The usual norm is a mean of logarithms, near the median of this steady run."""
    assert told.own[-1] / middle(told.own[:-1]) > 100
    told.say(told.alarm.layer or "", told.own[-1], told.step, "times its usual")
    told.say("usual", middle(told.own[:-1]), "limit 100 for a single step", digits=1)


def check_gradient_nonfinite(told: Told) -> None:
    """Of NaN."""
    assert told.words == f"the gradient of {told.alarm.layer} held NaN at step {told.step}"


def check_update(told: Told) -> None:
    """SGD at a rate of 0.05."""
    update = 0.05 * told.own[-1]
    told.say(told.step, update, update / told.own_weight[-1], "the norm of its weights", told.own_weight[-1], "limit 1")


def check_run_away(told: Told) -> None:
    """Growth within a hundred steps."""
    least = float(np.nanmin(told.own_weight[-100:]))
    told.say(told.own_weight[-1], told.step, told.own_weight[-1] / least, least, "limit 4")


def check_overshoot(told: Told) -> None:
    """The rate times the square of the norm, and the whole loss."""
    lower = 0.05 * told.norm[-1] ** 2
    told.say(told.step, lower, lower / told.loss[-1], "the whole loss", told.loss[-1], "limit 8", "most of it in")


def check_buffers(told: Told) -> None:
    """Found with a sample of the weights, at most 32 rows after the batch."""
    assert 50 <= told.step < 82
    assert told.words == f"a buffer of the model held NaN or infinity by step {told.step}"


def check_vanishing(told: Told) -> None:
    """The usual gradient of an element is an average of logarithms."""
    usual = float(np.exp(np.log(told.own[:-1]).mean())) / math.sqrt(told.size)
    told.say(usual, told.step, "smaller than that of the layer with the largest", "limit 1e6")


def check_growth_backward(told: Told) -> None:
    """The usual gradient of an element is an average of logarithms, of which the last rows count most."""
    usual = float(np.exp(np.log(told.own[-65:-1]).mean())) / math.sqrt(told.size)
    told.say(usual, told.step, "larger than that of a layer nearer to the loss", "limit 1,000", digits=1)


def check_dead(told: Told) -> None:
    """A whole layer."""
    assert (told.own == 0).all()
    told.say("exactly zero at step", told.step, "since step", 0.0)


def check_frozen(told: Told) -> None:
    """The layer is in no optimizer."""
    told.say("not one bit of", told.step, "limit 48", "no optimizer that made a step holds it")


def check_scale(told: Told) -> None:
    """Against the median of three gains, and where the loss is: below its beginning, but no longer falling."""
    sizes = {"0.weight": (128, 8), "2.weight": (256, 16), "4.weight": (16, 16)}
    weights = told.weight[~np.isnan(told.weight[:, 0])][-1][[0, 2, 4]]
    gains = [w * math.sqrt(f / n) for w, (n, f) in zip(weights, sizes.values(), strict=True)]
    told.say(told.alarm.layer or "", gains[0] / max(float(np.median(gains)), 0.5), told.step, "limit 10")
    told.say("hung at about", middle(told.loss[-32:]), middle(told.loss[:16]))


def check_chance(told: Told) -> None:
    """Four classes."""
    told.say(middle(told.loss[-51:-1]), told.step, "3 %", 4.0, math.log(4), middle(told.loss[:16]))


def check_overwritten(told: Told) -> None:
    """The update that the rate makes and the decay together, and where the loss is."""
    sizes = {"0.weight": (128, 8), "2.weight": (64, 16)}
    weights = told.weight[~np.isnan(told.weight[:, 0])][-1][[0, 2]]
    shares = [
        0.01 * math.sqrt(n) / max(w, 0.5 * math.sqrt(n / f)) for w, (n, f) in zip(weights, sizes.values(), strict=True)
    ]
    told.say(0.01, 100 * (middle(np.array(shares)) + 0.1), 10.0, "by weight decay", told.step, "limit 10 %")
    told.say("stuck at about", middle(told.loss[-32:]), middle(told.loss[:16]))


def check_opponent(told: Told) -> None:
    """The norms and the losses of the generator's own rows: every second one."""
    own = ~np.isnan(told.own)
    last, loss = told.own[own][-49:], told.loss[own]
    told.say("by step", told.step, told.alarm.numbers["largest"], last.max(), told.alarm.value, "limit 300")
    told.say("its loss rose", told.alarm.numbers["then"], middle(loss[-32:]))
    assert told.own[own][8:].min() < last.max() < told.alarm.numbers["largest"] / 300 < told.own[own].max() / 300
    assert loss.min() < told.alarm.numbers["then"] < middle(loss[-32:])


def check_clip_bites(told: Told) -> None:
    """The bound that the user set, and the norms before it."""
    told.say("your clip to a norm of 0.001", 100.0, "last 100 steps", told.step, "80 %", middle(told.norm[-100:]))
    told.say("stuck at about", middle(told.loss[-32:]), middle(told.loss[:16]))


def check_never(told: Told) -> None:
    """The largest norm that it let pass."""
    told.say("your clip had cut none", len(told.norm), told.step, 500.0, told.norm.max())


CHECKS: dict[str, Callable[[Told], None]] = {
    "GW101": check_no_traction,
    "GW102": check_loss_jump,
    "GW103": check_loss_nonfinite,
    "GW104": check_loss_runaway,
    "GW105": check_stays_up,
    "GW106": check_learning_lost,
    "GW201": check_weight_growth,
    "GW202": check_weight_nonfinite,
    "GW203": check_above_one,
    "GW301": check_surge,
    "GW302": check_gradient_nonfinite,
    "GW303": check_update,
    "GW304": check_run_away,
    "GW305": check_overshoot,
    "GW306": check_growth_backward,
    "GW307": check_buffers,
    "GW401": check_vanishing,
    "GW402": check_dead,
    "GW403": check_frozen,
    "GW404": check_scale,
    "GW405": check_chance,
    "GW406": check_overwritten,
    "GW407": check_opponent,
    "GW501": check_clip_bites,
    "GW502": check_never,
}


@pytest.mark.parametrize("code", [rule.code for rule in RULES])
def test_a_rule_says_what_the_rows_of_its_training_say(code: str) -> None:
    """Value, limit and step, in words."""
    CHECKS[code](Told(code, run(code)))


@pytest.mark.parametrize("code", [rule.code for rule in RULES])
def test_a_rule_speaks_plainly(code: str) -> None:
    """No comparison sign, no infinity as a value, the code for `gradwatch explain` at the end, numbers for --json."""
    alarm = Told(code, run(code)).alarm
    assert str(alarm) == f"{alarm.words} ({code})"
    assert not re.search(r">|<|\binf\b|\bnan\b|e\+|\(and |\b1 [a-z]+s\b", alarm.words)
    assert f"step {alarm.step}" in alarm.words
    assert all(isinstance(value, float) for value in alarm.numbers.values())


def test_dead_units_are_counted_in_per_cent_of_the_units() -> None:
    """Twelve of sixteen."""
    told = Told("GW402", units_die())
    told.say("75 % of the 16 units of 0.weight were dead at step", told.step, "exactly zero", "limit 50 %")


def test_an_update_that_float32_loses_is_named_with_the_weights() -> None:
    """The rate times the gradient."""
    told = Told("GW403", run("GW101"))
    told.say(
        "the update of", 1e-7 * told.own[-1], "too small", told.own_weight[~np.isnan(told.own_weight)][-1], told.step
    )
