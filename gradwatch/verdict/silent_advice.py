"""Advice on what does not learn: a loss that stalls, gradients that vanish, dead units, weights that never change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.ending import was_better
from gradwatch.history.statistics import median
from gradwatch.records import EXPLOSION
from gradwatch.rules.at_chance import AtChance
from gradwatch.rules.dead import began
from gradwatch.rules.opponent_won import OpponentWon, rate_of_opponent
from gradwatch.rules.overwritten import LARGE_EPS
from gradwatch.text.wording import number
from gradwatch.verdict.rates import (
    at,
    averages_apart,
    has_risen,
    lower_rate,
    raise_rate,
    scale_of_targets,
    shrunk,
    slower,
    still_rising,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Facts, Incident
    from gradwatch.verdict.opening import Opening

BORN = 32  # steps before which what is dead was never alive
_NAMED = 3  # layers that are named
_NAMING = ("dead", "frozen", "vanishing")  # kinds that name what does not learn
_FLOAT32 = "Keep a float32 copy of half-precision weights: small updates are lost to rounding."
_ROUNDED = 4.0  # multiple of the rate that changes a thousandth of a layer at which an update is as large as 2^-8 of it
_WORSE = 1.1  # multiple of the loss of guessing above which it is worse, and not at it
_GONE = 0.01  # share of a usual size of the weights, below which a model says nothing
_NOTHING = 1e-4  # share of the gradients below which a clip leaves nothing
_CLIPS = 32  # steps whose clips are looked at
_LITTLE = 0.1  # share of the gradients below which a clip leaves little
_OVERFIT = "Overfit one batch first: if the loss stays high there too, the fault is in the program, not in the data."
_GOOD = (
    "If the model was good from the first step, pre-trained or resumed, or the loss need not fall, as that of values or a "
    "policy, nothing is wrong."
)
_GATES = (
    "Use an LSTM or GRU instead of the vanilla RNN, with gates that begin open: a forget-gate bias of ln(T) for sequences of T "
    "steps."
)
ORTHOGONAL = "Initialise the recurrent weights orthogonally: they multiply the gradient at each time step."


def on_silence(
    incident: Incident, history: History, told: Sequence[str], opening: Opening, beside: Sequence[Incident]
) -> Iterator[str]:
    """Yield what to do about an incident that is no explosion.

    Args:
        incident: the incident.
        history: the history of the run.
        told: the remedies of the rules that fired.
        opening: what was known when it opened.
        beside: the other incidents that are open or have left damage.
    """
    silent = next((one for one in beside if one.open and one.kind in ("dead", "vanishing")), None)
    if incident.kind in ("stalled", "frozen") and (zero := _zero_rate(history)):
        yield zero
    elif incident.kind == "dead" and (empty := _gets_zeros(incident, history)):
        yield empty
    elif left := _left_by(incident, beside):
        yield left
    elif incident.kind == "frozen" and silent is not None:
        yield f"Follow the advice on the incident that is open since step {silent.opened_step} ({silent.kind}, {silent.suspect})."
    elif incident.kind == "stalled":
        yield from _stalled(incident, history, told, opening, beside)
    elif incident.kind == "vanishing":
        if any(sign.code == OpponentWon.code for sign in incident.signs):
            yield from _lost(incident, history)
        else:
            yield from _vanishing(history.facts, opening)
    elif incident.kind == "dead":
        yield from _dead(incident, history, opening)
    elif incident.kind == "frozen":
        yield from _frozen(incident, history, opening)


def _left_by(incident: Incident, beside: Sequence[Incident]) -> str:
    """Return what to do about what an earlier explosion has probably left behind; "" if there was none."""
    cause = next((one for one in beside if one.kind in EXPLOSION and one.opened_step < incident.opened_step), None)
    if cause is None or cause.severity == "notice":
        return ""
    step = cause.opened_step
    begin = "Begin anew" if step < BORN else f"Go back to a checkpoint from before step {step}"
    return (
        f"{begin}, and follow the advice on the incident that opened at step {step} ({cause.kind}): it has probably left this "
        "behind."
    )


def _stalled(
    incident: Incident, history: History, told: Sequence[str], opening: Opening, beside: Sequence[Incident]
) -> Iterator[str]:
    named = next((one for one in beside if one.open and one.kind in _NAMING and one.severity != "notice"), None)
    known = slower(incident) or cause_of_stall(history, opening)  # what each update does is known
    if named is not None and not known:
        yield (
            f"Follow the advice on the incident that is open since step {named.opened_step} first: it names what does not learn "
            f"({named.kind}, {named.suspect})."
        )
    small = (
        known,
        scale_of_targets(history),
        raise_rate(opening),
        _rounded(history.facts, opening),
    )
    guessed = "" if any(small) else _above_guessing(incident, opening)
    gates = _GATES if history.facts.recurrent and not history.facts.gated else ""
    first, *more = [line for line in (*small, guessed, *told, still_rising(history, opening), gates, _OVERFIT) if line]
    # a notice is shown with its first advice alone
    above = history.loss_level()[0] > history.reference_loss + abs(history.reference_loss) / 10
    good = incident.severity == "notice" and named is None and not above and not was_better(history)
    yield f"{first} {_GOOD}" if good else first
    yield from more
    yield f"Change the learning rate{at(opening)} by factors of three in both directions."
    if not history.facts.embeds:
        yield "Scale the inputs to zero mean and unit variance."


def cause_of_stall(history: History, opening: Opening) -> str:
    """Return what to do about a loss that stalls, where the weights, the user's clip or the optimizer's eps may be the cause."""
    facts = history.facts
    return _held(history, opening) or _large_eps(facts) or averages_apart(facts) or shrunk(history, opening)


def learns_nothing(history: History, opening: Opening) -> bool:
    """Return whether the loss stalls for a cause that no model has which was good from the start.

    Hardly anything is left of the weights, or nothing of the gradients.
    """
    nothing = history.clips_each_step and median(history.clip_coefficient(last=_CLIPS)) < _NOTHING
    return opening.gain < _GONE or nothing


def _above_guessing(incident: Incident, opening: Opening) -> str:
    """Return what to do about a cross-entropy that is well above that of guessing; "" if it is not."""
    sign = next((sign for sign in incident.signs if sign.code == AtChance.code), None)
    if sign is None or not sign.numbers["loss"] > _WORSE * math.log(sign.numbers["classes"]):
        return ""
    return (
        f"Lower the learning rate{at(opening)}, or bound the outputs: the model is sure of what is wrong, since without any "
        "knowledge the loss would be lower."
    )


def _held(history: History, opening: Opening) -> str:
    """Return that the user's clip leaves little of each gradient of SGD; "" if it does not."""
    left = median(history.clip_coefficient(last=_CLIPS))
    if not history.clips_each_step or not (left == 0 or (opening.family == "sgd" and left < _LITTLE)):
        return ""
    if left == 0:
        return "Raise the bound of your own clip: it leaves nothing of the gradients. A clip that is switched off has no bound."
    return f"Raise the bound of your own clip: of the gradients of the last steps, it left {number(100 * left, 2)} % as a median."


def _large_eps(facts: Facts) -> str:
    """Return that the eps of an optimizer like Adam is far above all gradients; "" if it is not."""
    eps = facts.option("eps")
    if facts.family != "adam" or not eps > LARGE_EPS:
        return ""
    told = f"{facts.optimizer} divides by the size of the gradients plus this"
    return f"Lower eps: 1e-8 instead of {number(eps)}. {told}, so that updates are as much shorter."


def _rounded(facts: Facts, opening: Opening) -> str:
    """Return that updates below bfloat16's precision are lost; "" if weights have more bits, or if updates are longer."""
    return _FLOAT32 if facts.narrow and not opening.rate > _ROUNDED * opening.usual_rate else ""


def _zero_rate(history: History) -> str:
    if history.zero_rate_since is None:
        return ""
    step, exactly = history.zero_rate_since
    return f"The learning rate of every group has been 0 since step {step}{'' if exactly else ' or before'}: check the scheduler."


def _lost(incident: Incident, history: History) -> Iterator[str]:
    yield (
        f"Train what {incident.suspect} belongs to by a loss that does not saturate where the other part wins, such as "
        "-log D(G(z)) in place of log(1 - D(G(z))), or the Wasserstein loss."
    )
    rate = rate_of_opponent(history, incident.suspect)
    told = f" ({number(rate)} when this began)" if math.isfinite(rate) else ""
    yield f"Lower the learning rate of the other optimizer{told}, or let it make fewer steps."


def _vanishing(facts: Facts, opening: Opening) -> Iterator[str]:
    if math.isfinite(opening.gain):
        yield (
            "Initialise the weights anew, by He or Xavier: for their number of inputs, they are "
            f"{number(opening.gain, 2)} times the usual size."
        )
    if facts.recurrent and not facts.gated:
        yield _GATES
    if facts.saturates and not facts.rectified:
        yield "Use ReLU-like activations instead of sigmoid or tanh, with He initialisation."
    if facts.recurrent:
        yield ORTHOGONAL
        return
    if not facts.normalised:
        yield "Add residual connections or normalisation, or use fewer layers."
    yield "Look at the weights of the layers between: a scale far below one in each of them multiplies."


def _gone(incident: Incident) -> str:
    """Return what to do about layers that no backward reaches; "" if their gradients are zero instead."""
    gone = [sign for sign in incident.signs if sign.numbers.get("absent")]
    if any(sign.numbers.get("never") for sign in gone):
        return (
            "Look for what cuts the loss off from the model: no gradient has reached any layer. It may be a loss that is made "
            "anew from a number (torch.tensor, item()), an argmax, a detach(), or a forward under torch.no_grad()."
        )
    if not gone:
        return ""
    sign = next((sign for sign in gone if sign.layer == incident.suspect), gone[0])
    return (
        f"Look for what the program does otherwise since {began(sign.numbers)}: from then on, no backward reaches "
        f"{sign.layer} (a part that is no longer used, an expert that no router chooses, a detach(), a torch.no_grad()). "
        "If that is meant, freeze it with requires_grad_(False)."
    )


def _gets_zeros(incident: Incident, history: History) -> str:
    """Return that all inputs of the suspect are zero, as a gradient of its bias beside none of its weights shows; else ""."""
    if incident.suspect not in history.layers:
        return ""
    column = history.layers.index(incident.suspect)
    biases = (history.weight_of == column) & (history.row.grad_norm > 0)
    if history.row.grad_norm[column] != 0 or not biases.any():
        return ""
    bias = history.layers[int(np.argmax(biases))]
    return (
        f"Look at what {incident.suspect.rpartition('.')[0] or 'the model'} gets: its inputs are all zero, since {bias} has a "
        f"gradient and {incident.suspect} has none. It may be the data, a mask, or the layer before."
    )


def _dead(incident: Incident, history: History, opening: Opening) -> Iterator[str]:
    facts = history.facts
    if gone := _gone(incident):
        yield gone
        return
    module = (incident.suspect or "").rpartition(".")[0] or incident.suspect
    born = opening.step < BORN and incident.suspect is not None
    if facts.dropouts:
        yield f"Lower the p of dropout {', '.join(facts.dropouts[:_NAMED])}: at 1 it drops everything, and no gradient passes."
        return
    if not born and (small := shrunk(history, opening)):
        yield small
    if has_risen(opening):
        yield lower_rate(incident, history, opening)
    if opening.zeros:
        more = f" and {len(opening.zeros) - _NAMED} more" if len(opening.zeros) > _NAMED else ""
        yield (
            f"Initialise the weights anew, by He or Xavier: those of {', '.join(opening.zeros[:_NAMED])}{more} are all zero, and "
            "no gradient passes back through zeros."
        )
    elif born:
        yield f"Initialise module {module} anew, with biases at zero: {incident.suspect} was dead from the first steps on."
    cut = f"Look for a detach(), an argmax or an output that the loss does not use, between {incident.suspect} and the loss."
    # ReLU units that have had a gradient die by themselves as a rule
    unused = not facts.saturates and (born or not facts.rectified) and _ends_before_its_bias(incident, history)
    if unused:
        yield cut
    yield from _saturated_or_off(facts, opening, born=born)
    if not unused and any(sign.numbers.get("layer") for sign in incident.signs):
        yield cut


def _saturated_or_off(facts: Facts, opening: Opening, *, born: bool) -> Iterator[str]:
    """Yield what to do about units that pass no gradient, by the activations of the model."""
    if facts.saturates and not facts.rectified:
        if not facts.embeds:
            yield "Scale the inputs to zero mean and unit variance: far from zero, sigmoid and tanh pass no gradient at all."
        yield f"Lower the learning rate{at(opening)}: large weights saturate sigmoid and tanh too."
    elif facts.rectified:
        if not born:
            yield f"Lower the learning rate{at(opening)}: ReLU units usually die from a single large step."
        yield "Use LeakyReLU or GELU, and scale the inputs."
    elif facts.recurrent and not born:
        yield f"Lower the learning rate{at(opening)}: saturated states and gates pass no gradient."


def _ends_before_its_bias(incident: Incident, history: History) -> bool:
    """Return whether the dead layers end with a whole module, bias included.

    A dead ReLU leaves a gradient to the bias of the layer after it; a saturated activation may leave all of that layer alive.
    """
    silent = {sign.layer for sign in incident.signs if sign.layer in history.layers and sign.numbers.get("layer")}
    places = [place for place, name in enumerate(history.layers) if name in silent]
    if not places:
        return False
    last = min(places, key=lambda place: float(history.order[place]))
    module = history.layers[last].rpartition(".")[0]
    own = [place for place, name in enumerate(history.layers) if name.rpartition(".")[0] == module]
    return len(own) > 1 and not history.matrices[own].all() and set(own) <= set(places)


def _frozen(incident: Incident, history: History, opening: Opening) -> Iterator[str]:
    facts, suspect = history.facts, incident.suspect
    sign = next((sign for sign in incident.signs if sign.layer == suspect), incident.signs[0])
    if not sign.numbers.get("owned", True):
        yield f"Build the optimizer from model.parameters() after the model is final: none that made a step holds {suspect}."
        return
    if was_better(history) and not math.isnan(opening.usual_rate):
        yield _fallen_silent(opening)
        return
    known = [line for line in (_held(history, opening), raise_rate(opening), _faint(suspect, history)) if line]
    yield from known
    if facts.narrow:
        yield _FLOAT32
    if not known:
        yield f"Check the learning rate of the parameter group of {suspect}{at(opening)}, and its schedule."
        yield f"Look for what puts {suspect} back to its old values after a step, such as another copy that is loaded into it."


def _fallen_silent(opening: Opening) -> str:
    return (
        f"Go back to a checkpoint from before the loss rose, and go on at a lower learning rate{at(opening)}: the run had "
        "learned, and has lost it. What is left of its gradients changes nothing, as behind dead or saturated units."
    )


def _faint(suspect: str | None, history: History) -> str:
    """Return that the gradient of the suspect is lost in the eps by which its optimizer keeps from zero; "" if it is not."""
    facts = history.facts
    eps = facts.option("eps")
    if suspect not in history.layers or facts.family != "adam" or not eps > 0:
        return ""
    element = float(history.typical_elements()[history.layers.index(suspect)])
    if not element < eps / 10:
        return ""
    return (
        f"Look at why the gradient of {suspect} is so small ({number(element)} per element): {facts.optimizer} adds its eps of "
        f"{number(eps)} before it divides by that size, so that little is left of the update."
    )
