"""Advice on the learning rate, with a number to try where one is known.

The share of its weights that an update may change is that of Karpathy, CS231n notes: about one in a thousand; a tenth of the
weights is far too much. That is where a number for SGD aims; optimizers that divide gradients by their own size make updates of
that length at each step, and not only at the beginning, so theirs is a third of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.text.wording import number
from gradwatch.verdict.opening import weights_in_words

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Facts, Incident
    from gradwatch.verdict.opening import Opening

SWINGS = 2.0  # decrease that an update predicts, over the loss, beyond which it passes the minimum (Polyak)
_BORNE = {"sgd": 0.1}  # share of its weights that an update may change in the first steps
_BORNE_ELSE = 0.03
_USUAL = 1e-3  # share of its weights that an update usually changes
_LARGE = 1e3  # first loss from which targets may need scaling
_FALLEN = 2.0  # multiple of a rate beyond which a higher one before is told
_RISEN = 10.0  # multiple of the first rate beyond which a rate has risen
_RAISED = 10.0  # least factor by which a rate is to be raised
_LEAST = 1e-5  # rate of SGD below which no one trains: it is the gradients that are too large
_MOST = 1.0  # and above which: they are too small
_SURGE = 100.0  # growth of a gradient from one step to the next that no rate explains under which the run went well


def lower_rate(incident: Incident, history: History, opening: Opening) -> str:
    """Return the advice to lower the rate, with a number where one is known: the rate before it was raised, or one to try."""
    rate = opening.rate
    if not rate > 0:
        return "Lower the learning rate of its parameter group, or warm it up."
    if opening.raised_at >= 0:
        before, to = number(opening.raised_from), number(opening.raised_to)
        other = " of another parameter group" if rate < opening.raised_to / 2 else ""
        return (
            f"The learning rate{other} was raised from {before} to {to} at step {opening.raised_at}: check its schedule, and "
            f"go back to {before}, which the run had borne until then."
        )
    new, told = _rate_to_try(incident, opening)
    if has_risen(opening):
        risen = f"The learning rate has risen from {number(opening.first_rate)} to {number(rate)} since the start"
        risen += f", on its way to {number(opening.aim)}" if opening.aim > 0 else ""
        below = number(rate / _RISEN if math.isnan(new) else new, 1)
        return f"{risen}: check its schedule, and keep it below {below}. {told}".rstrip()
    if math.isnan(new):
        return f"Lower the learning rate{_whose(incident, history)}{at(opening)}, or warm it up."
    instead = number(rate)
    if opening.aim > 0:
        instead = f"the {number(opening.aim)} that is set, of which {instead} was reached"
    return f"Lower the learning rate{_whose(incident, history)}: {number(new, 1)} instead of {instead}. {told}"


def not_of_the_rate(incident: Incident, opening: Opening) -> str:
    """Return why the gradient of SGD is to blame and not the rate, in a sentence; "" if that is not known.

    Either it grew a hundredfold in one step, at a rate that the run had borne, or only a rate bears it at which no one trains.
    """
    if opening.family != "sgd" or opening.raised_at >= 0 or not opening.rate > 0:
        return ""
    if surged := surge_of(opening):
        return surged
    new, told = _rate_to_try(incident, opening)
    return f"No usual learning rate bears such gradients. {told}" if new < _LEAST else ""


def surge_of(opening: Opening) -> str:
    """Return that the gradient grew a hundredfold in one step, at a rate that the run had borne; "" if it did not."""
    borne = opening.raised_at < 0 and not opening.rising and not opening.shaken
    if not (opening.surge > _SURGE and borne):
        return ""
    return (
        f"In one step, the gradient of {opening.usual_layer} became {number(opening.surge)} times as large, at a learning "
        "rate that the run had borne until then."
    )


def _rate_to_try(incident: Incident, opening: Opening) -> tuple[float, str]:
    """Return a rate at which updates are borne, and how long one was, in a sentence; (NaN, "") if nothing is known."""
    rate = opening.rate
    if opening.first_borne < rate / 2 and not has_risen(opening):
        share = _BORNE["sgd"] * rate / opening.first_borne
        return (
            # momentum adds up earlier updates, whose directions differ
            opening.first_borne * math.sqrt(1 - opening.momentum**2),
            f"At {number(rate)}, the first update alone is {_length(share, opening.first_base)}.",
        )
    longest, over = _at_first(incident, "GW303"), _at_first(incident, "GW305")
    borne = _BORNE.get(opening.family, _BORNE_ELSE)
    # of a run that has trained, gradients in the explosion say less than how far its updates are too long
    if not opening.young and opening.predicted > SWINGS and (over or (longest and longest.value > borne)):
        times = number(opening.predicted, 2)
        return (
            rate * SWINGS / opening.predicted,
            f"By its gradients, an update was to lower the loss by {times} times itself.",
        )
    if longest is not None and longest.value > borne:
        told = longest.numbers
        small = told.get("weight", 0.0) < told.get("floor", 0.0)
        base = weights_in_words(longest.layer or "", small=small)
        # half of what a rate alone is to move is compared with the limit
        length = _length((2 if told.get("by rate") else 1) * longest.value, base)
        return rate * borne / longest.value, f"An update was {'to be ' if told.get('by rate') else ''}{length}."
    if over is not None and over.value > 1:
        return rate / over.value, f"A step was to take {number(over.value)} times as much from the loss as it held."
    return math.nan, ""


def _length(share: float, base: str) -> str:
    size = f"{100 * share:.0f} %" if share < 1 else f"{number(share)} times"
    return f"{size} as long as {base}"


def slower(incident: Incident) -> str:
    """Return the advice to change less of the weights per step, if a sign says how much is changed; else ""."""
    sign = next((sign for sign in incident.signs if sign.code == "GW406"), None)
    if sign is None:
        return ""
    update, decay, rate = (sign.numbers[name] for name in ("update", "decay", "rate"))
    told = f"An update may change {number(100 * sign.value, 2)} % of the weights in each step"
    if decay > 10 * _USUAL and update <= sign.limit:  # else the rate is too high with any decay
        new, now = number(_USUAL / 10 / rate, 1), number(decay / rate)
        return f"Lower the weight decay: {new} instead of {now}. {told}, and {number(100 * decay, 2)} % go by the decay alone."
    return f"Lower the learning rate: {number(rate * _BORNE_ELSE / update, 1)} instead of {number(rate)}. {told}."


def raise_rate(opening: Opening) -> str:
    """Return the advice to raise a rate at which updates are far too short, or the gradients; "" if they are not."""
    if not 0 < _RAISED * opening.rate < opening.usual_rate or math.isfinite(opening.gain):
        return ""  # weights that have shrunk bear no rate
    if opening.top_rate > _RISEN * opening.rate:
        return (
            f"The learning rate has fallen from {number(opening.top_rate)} to {number(opening.rate)}: check its schedule. "
            f"At {number(opening.usual_rate, 1)}, an update changes a thousandth of {opening.usual_layer}."
        )
    if opening.family == "sgd" and opening.usual_rate > _MOST:
        share = f"{number(_USUAL * opening.rate / opening.usual_rate)} of {opening.usual_layer}"
        return (
            "Look at what makes the gradients so small, such as a loss that is divided twice, inputs far below one, or small "
            f"initial weights in many layers: at a rate of {number(opening.rate)}, an update changes {share}, and no usual rate "
            "changes a thousandth."
        )
    return (
        f"Raise the learning rate: {number(opening.usual_rate, 1)} instead of {number(opening.rate)}, so that an update "
        f"changes a thousandth of {opening.usual_layer}; then by factors of ten, as long as the loss falls faster."
    )


def shrunk(history: History, opening: Opening) -> str:
    """Return the advice on weights that are far smaller than usual in a run that does not learn; "" if they are not."""
    if not math.isfinite(opening.gain):
        return ""
    small = f"for their number of inputs, the weights are {number(opening.gain, 2)} times the usual size"
    facts = history.facts
    decay = facts.option("weight_decay")
    decoupled = facts.decay > 0 or not 0 <= facts.momentum < 1
    lasts = 1.0 if decoupled else 1 - facts.momentum  # of what the decay takes; no momentum adds to a decoupled one
    known = facts.decay > 0 or opening.family == "sgd"
    if decay > 0 and not known:
        return f"Look at the weight decay of {number(decay)}: {small}."
    share = opening.rate * decay / lasts if known else 0.0
    if share > _USUAL:
        new = number(_USUAL / 10 * lasts / opening.rate, 1)
        told = f"it takes {number(100 * share * lasts, 2)} % of the weights in each step"
        told += f", and with the momentum {number(1 / lasts, 2)} times that" if lasts < 1 else ""
        return f"Lower the weight decay: {new} instead of {number(decay)}. {told[:1].upper()}{told[1:]}; {small}."
    return f"Initialise the weights anew, by He or Xavier: {small}."


def has_risen(opening: Opening) -> bool:
    """Return whether the rate is far above the first one."""
    return opening.rate > _RISEN * opening.first_rate


def at(opening: Opening) -> str:
    """Return the rate at which an incident began, in brackets, and one far above before it or to come; "" if unknown."""
    if not math.isfinite(opening.rate):
        return ""
    highest = f", after {number(opening.top_rate)} at its highest" if opening.top_rate > _FALLEN * opening.rate else ""
    aim = f", on its way to {number(opening.aim)}" if opening.aim > 0 else ""
    return f" ({number(opening.rate)} when this began{highest}{aim})"


def scale_of_targets(history: History) -> str:
    """Return that the targets may have to be scaled, if the first loss was very large; "" if not, or for a cross-entropy."""
    if not (history.first_loss > _LARGE and history.facts.loss in ("", "squared error")):
        return ""
    return (
        "Scale the targets and the inputs to about one, if they are not: the loss of the first step was "
        f"{number(history.first_loss)}, so the gradients are large too."
    )


def averages_apart(facts: Facts) -> str:
    """Return that Adam forgets the size of gradients before their direction; "" if it does not, or if it is not known.

    Its updates are bounded by a multiple of the rate only if ``beta1**2 < beta2``. Kingma & Ba 2015, arXiv:1412.6980, ask for
    ``beta1**2 < sqrt(beta2)``.
    """
    if facts.betas is None or not facts.betas[0] ** 2 >= facts.betas[1]:
        return ""
    first, second = facts.betas
    return (
        f"Set betas to (0.9, 0.999) instead of ({number(first, 6)}, {number(second, 6)}): {facts.optimizer} forgets the size of "
        "gradients before their direction, and its updates need not be bounded by the rate."
    )


def still_rising(history: History, opening: Opening) -> str:
    """Return that the rate is far above the first one and at its highest so far, with what to check; "" if it is not."""
    if not (history.warming_up and has_risen(opening) and opening.rate >= opening.top_rate):
        return ""
    rise = f"from {number(opening.first_rate)} to {number(opening.rate)}, the highest so far"
    return f"The learning rate has risen {rise}: check that its warm-up ends."


def _at_first(incident: Incident, code: str) -> Alarm | None:
    """Return the sign with the largest finite value among the first ones of a rule; None if there is none."""
    signs = [sign for sign in incident.signs if sign.code == code and math.isfinite(sign.value)]
    first = min((sign.step for sign in signs), default=0)
    return max((sign for sign in signs if sign.step == first), key=lambda sign: sign.value, default=None)


def _whose(incident: Incident, history: History) -> str:
    rates = history.rate[np.isfinite(history.rate)]
    differ = bool(rates.size) and bool((rates != rates[0]).any())
    return f" of the group of {incident.suspect}" if incident.suspect and differ else ""
