"""Advice on an incident, given the model, the optimizer, the loss and the evidence. What is known comes first.

The remedies come from the literature: Pascanu et al. 2013 (clipping by norm), Brownlee 2019 (the practitioners' list),
Zhang & Sennrich 2019, Wortsman et al. 2023, arXiv:2309.14322 (rates and warm-up for Adam).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.history.in_use import usual_norms_of
from gradwatch.records import EXPLOSION
from gradwatch.rules.learning_lost import LearningLost
from gradwatch.text.wording import number
from gradwatch.verdict.rates import (
    SWINGS,
    at,
    averages_apart,
    has_risen,
    lower_rate,
    not_of_the_rate,
    scale_of_targets,
    shrunk,
    still_rising,
    surge_of,
)
from gradwatch.verdict.silent_advice import BORN, ORTHOGONAL, on_silence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Facts, Incident
    from gradwatch.verdict.opening import Opening

_MOST = 4
_FIRST = 12  # steps in which the weights of one layer may move alone
_MOMENTUM = 0.99  # momentum of SGD beyond which the momentum is named
_DEEP = 10  # weight matrices from which a model without normalisation is deep


def advise(
    incident: Incident,
    history: History,
    remedies: Mapping[str, str],
    opening: Opening,
    *,
    harmless: bool = False,
    of_the_batch: bool = False,
    beside: Sequence[Incident] = (),
    moved: str | None = None,
) -> tuple[str, ...]:
    """Return at most four pieces of advice, the most likely to help first.

    Args:
        incident: the incident to advise on.
        history: the history of the run, whose facts describe the model and the optimizer.
        remedies: the remedies of rules, by code.
        opening: what was known when it opened.
        harmless: whether the loss was not finite although every gradient of its step was zero.
        of_the_batch: whether it opened with a loss farther up than the last update can have raised it.
        beside: the other incidents that are open or have left damage, in opening order.
        moved: the only layer whose weights were changed before it opened; None: there is none, or it is not known.
    """
    lines: list[str] = []
    codes = dict.fromkeys(sign.code for sign in incident.signs)
    told = [remedies[code].format(suspect=incident.suspect) for code in codes if remedies.get(code)]
    if history.facts.has_decay:
        told = [line for line in told if "L2 penalty" not in line]  # there is one
    lines += [mistake[:1].upper() + mistake[1:] for mistake in history.facts.mistakes]
    if history.is_raised or history.is_no_entropy or history.goes_uphill:
        return tuple(lines)
    if opening.burst_at >= 0 and incident.kind in ("exploding", "diverging", "spike"):
        alone = opening.burst_at == opening.burst_until
        when = f"step {opening.burst_at} alone" if alone else f"steps {opening.burst_at} to {opening.burst_until}"
        burst = (
            f"it was {number(opening.burst)} at {when}, and {number(opening.rate)} after {'it' if alone else 'them'}"
        )
        return (*lines, f"Look at what sets the learning rate: {burst}.")
    since = next((sign.numbers["high since"] for sign in incident.signs if sign.code == "GW105"), math.inf)
    if incident.kind == "diverging" and since < incident.opened_step and opening.raised_at < 0 and not opening.rising:
        return (*lines, what_changed(int(since)))
    first = _known_cause(incident, opening, moved, of_the_batch=of_the_batch)
    lost = _lost(incident, opening)
    lines += [line for line in (first, lost) if line]
    if lost and not any(sign.sign == "growth" for sign in incident.signs):
        return tuple(lines)  # no update stands out
    if first and incident.kind == "spike":
        return tuple(lines)
    for line in (
        _harmless() if harmless else _lines(incident, history, told, opening, beside, of_the_batch=of_the_batch)
    ):
        if line not in lines:
            lines.append(line)
    return tuple(lines[:_MOST])


def _known_cause(incident: Incident, opening: Opening, moved: str | None, *, of_the_batch: bool) -> str:
    """Return where to look: at what moved the weights, or at the batch; "" if neither is known."""
    step = incident.opened_step
    if opening.raised_at >= 0:  # which explains moved weights and a high loss
        return ""
    if opening.moved_layer is not None and incident.kind in ("exploding", "diverging"):
        return (
            f"Look at what changed the weights just before step {step}: {opening.moved_layer} moved "
            f"{number(opening.moved, 2)} times as far as its rate and its gradients can have moved it. It may be an "
            "optimizer's state that was loaded or scaled, or the program itself."
        )
    long = opening.rising or any(sign.code in ("GW303", "GW305") for sign in incident.signs)
    if moved is not None and not long and step >= _FIRST and incident.kind in ("exploding", "spike", "diverging"):
        return (
            f"Look at what changed {moved} just before step {step}: the program, a state that was loaded, or the rate of its "
            "group. No other layer stands out by its norm."
        )
    if _comes_round(incident, opening, of_the_batch=of_the_batch):
        return _what_comes_round(incident)
    if of_the_batch and incident.kind in ("exploding", "diverging") and not incident.in_series:
        return f"Look at the batch of step {step}: the last update cannot have raised its loss so far."
    return ""


def what_changed(step: int) -> str:
    """Return what to look for if the loss has been high since a step, and no update has raised it."""
    return (
        f"Look at what changed about step {step}: the data, the scale of the inputs or of the targets, weights that were loaded, "
        "or the loss itself. If that was meant, nothing is wrong as long as the loss comes down again."
    )


def _lost(incident: Incident, opening: Opening) -> str:
    """Return where to go back to if most of what was learned is lost; "" if it is not, or if the cause is known."""
    sign = next((sign for sign in incident.signs if sign.code == LearningLost.code), None)
    if sign is None or incident.kind != "diverging" or opening.raised_at >= 0:
        return ""
    return (
        f"Go back to a checkpoint from about step {sign.numbers['best at']:.0f}, the best so far, and go on at a lower learning "
        f"rate{at(opening)}. If the loss itself was changed since, compare its parts."
    )


def _comes_round(incident: Incident, opening: Opening, *, of_the_batch: bool) -> bool:
    """Return whether it is an explosion of one step that comes back with a period."""
    again = incident.since is not None and incident.period is not None and incident.kind in ("exploding", "diverging")
    return again and (of_the_batch or surge_of(opening) != "")


def _what_comes_round(incident: Incident) -> str:
    return (
        f"Look at what comes about every {incident.period} steps, first at step {incident.since}: an odd batch that comes round, "
        "or what the program does then."
    )


def _lines(
    incident: Incident,
    history: History,
    told: Sequence[str],
    opening: Opening,
    beside: Sequence[Incident],
    *,
    of_the_batch: bool,
) -> Iterator[str]:
    if incident.kind not in EXPLOSION:
        yield from on_silence(incident, history, told, opening, beside)
        return
    if any(sign.code == "GW307" for sign in incident.signs):
        yield from _buffers(incident)
    if {sign.code for sign in incident.signs if sign.kind == "nonfinite"} == {"GW307"} and incident.kind == "nonfinite":
        return
    both = any(s.sign == "growth" for s in incident.signs) and any(s.kind == "nonfinite" for s in incident.signs)
    if incident.origin is not None and incident.kind == "nonfinite":
        yield from incident.origin.advice
    if incident.kind == "spike":
        yield from _spike(incident, history, opening, of_the_batch=of_the_batch)
    elif incident.kind == "nonfinite":
        yield from _nonfinite(incident, history)
        if both and not (incident.origin is not None and incident.origin.came_with_the_batch):
            yield from _explosion(incident, history, opening, of_the_batch=of_the_batch)
        yield from _look_closer(incident)
    else:
        yield from _on_growth(incident, history, told, opening, of_the_batch=of_the_batch)
        if both:
            yield from _nonfinite(incident, history)
            yield from _look_closer(incident)


def _on_growth(
    incident: Incident, history: History, told: Sequence[str], opening: Opening, *, of_the_batch: bool
) -> Iterator[str]:
    """Yield what to do about an explosion or a divergence of finite numbers."""
    yield from _runaway_series(incident)
    if {sign.code for sign in incident.signs if sign.sign == "growth"} == {"GW306"}:
        if small := shrunk(history, opening):
            yield small
            return
        # no rate suits all layers
        yield from (line.replace(", or add normalisation", "") if history.facts.normalised else line for line in told)
        yield from _structure(history.facts)
    elif of_the_batch and opening.raised_at < 0 and not any(sign.sign == "growth" for sign in incident.signs):
        if not incident.in_series:  # no rate has raised the loss
            yield "If the data or the targets were changed for good, nothing is wrong as long as the loss comes down again."
    else:
        yield from _explosion(incident, history, opening, of_the_batch=of_the_batch)
        yield from told if opening.raised_at < 0 else ()


def _buffers(incident: Incident) -> Iterator[str]:
    named = [line for line in incident.evidence if ", buffer " in line]
    if named and not any("running_" in line for line in named):
        yield "Look at what writes NaN or infinity into that buffer. If infinity is meant there, nothing is wrong."
        return
    restored = incident.clip is not None and incident.clip.skipped > 0
    yield (
        "Leave batches with NaN or infinity out before the forward pass: a normalisation takes them into its running statistics "
        f"there, {'and auto-clip has to restore these' if restored else 'whether or not a step is made'}."
    )
    if len({sign.code for sign in incident.signs}) == 1:
        yield (
            "Go back to a checkpoint whose buffers are finite, or call reset_running_stats() on that module and train on: "
            "evaluation uses these statistics."
        )


def _runaway_series(incident: Incident) -> Iterator[str]:
    if incident.in_series:
        yield (
            f"Look at what the program does about every {incident.period} steps: the loss jumps farther each time. If it updates "
            "a target network, the values run away: check the discount and the end of episodes, bound the targets."
        )


def _spike(incident: Incident, history: History, opening: Opening, *, of_the_batch: bool) -> Iterator[str]:
    if incident.in_series:
        yield (
            f"Look at what the program does about every {incident.period} steps, such as updating a target network or changing "
            "the task, and whether the same odd batch comes round in each epoch: the last update cannot have raised the loss so "
            "far. If it is meant, nothing is wrong."
        )
        return
    if opening.raised_at >= 0:
        yield lower_rate(incident, history, opening)
        if not of_the_batch:
            return
    elif rising := still_rising(history, opening):
        yield rising
    step = incident.opened_step
    if of_the_batch and incident.period is not None:
        yield _what_comes_round(incident)
    elif of_the_batch:
        yield f"Look at the batch of step {step}: the last update cannot have raised its loss so far."
    elif opening.predicted > SWINGS:
        yield (
            f"By its gradients, the update of step {step} would lower the loss by {number(opening.predicted, 2)} times itself: "
            f"at more than {SWINGS:g}, training swings, and comes back by itself as a rule. If it does not, or the swings "
            f"grow, lower the learning rate{at(opening)}."
        )
        return
    else:
        yield (
            f"Look at the batch of step {step}, and at the update before it, which may have raised the loss too. A single jump "
            "that comes back is usually caused by one unusual batch."
        )
    yield from _odd_batches(incident, history)


def _harmless() -> Iterator[str]:
    yield (
        "The weights took no harm: every gradient of this step was zero, as of a mean over nothing (all labels ignored, an empty "
        "mask). Leave such batches out, or divide by max(count, 1)."
    )


def _explosion(incident: Incident, history: History, opening: Opening, *, of_the_batch: bool) -> Iterator[str]:
    facts = history.facts
    down = next(
        (sign.numbers["loss"] for sign in incident.signs if sign.code == "GW104" and sign.numbers["loss"] < 0), None
    )
    if down is not None:
        yield f"Check the sign of the loss, or bound it: it ran down to {number(down)}, and has no floor there."
    if opening.raised_at < 0:  # what the run had borne before is not too large
        yield from _scale(history, opening)
    if _MOMENTUM < facts.momentum < 1 and opening.family == "sgd":
        times = number(1 / (1 - facts.momentum), 2)
        yield f"Lower the momentum: 0.9 instead of {number(facts.momentum, 6)}. It adds up to {times} updates in each step."
    if opening.raised_at >= 0:
        yield lower_rate(incident, history, opening)
        if opening.family == "adam":
            yield f"A{_no_cure(facts)[1:]}."
        return
    if opening.family == "adam" and (apart := averages_apart(facts)):
        yield apart
    yield from _rate_and_clip(incident, history, opening, of_the_batch=of_the_batch)
    if facts.recurrent:
        if not facts.gated:
            yield "Use an LSTM or GRU instead of the vanilla RNN."
        yield "Shorten the sequences: truncate backpropagation through time."
    yield from _structure(facts)


def _rate_and_clip(incident: Incident, history: History, opening: Opening, *, of_the_batch: bool) -> Iterator[str]:
    """Yield what to do about the rate and the clip, the more likely cause first."""
    facts = history.facts
    own_clip = history.clips_each_step
    rate_line = lower_rate(incident, history, opening)
    clip_line = 'Clip by norm when it happens: attach(model, clip="norm").' if facts.clip is None else ""
    if own_clip:
        clip_line = ""
    if own_clip and not (of_the_batch or surge_of(opening)):  # it bounds the step of a single batch
        clip_line = "Lower the bound of your own clip: it bounds the length of a step, and the run leaves its range all the same."
    step = opening.surged_at if opening.surged_at >= 0 else incident.opened_step
    known = of_the_batch or _comes_round(incident, opening, of_the_batch=False)  # and told before
    look = "" if known else f"Look at what step {step} does, its batch and its loss."
    if blame := not_of_the_rate(incident, opening):
        yield from _for_a_reason(clip_line or look, blame)
        if facts.recurrent and not facts.gated:
            yield ORTHOGONAL
    elif any(sign.code in ("GW303", "GW304", "GW305", "GW201") for sign in incident.signs):
        yield rate_line
        if opening.family == "adam" and not has_risen(opening):
            yield f"Warm the rate up over the first few hundred steps; {_no_cure(facts)}."
        elif opening.family == "adam":
            yield f"A{_no_cure(facts)[1:]}."
        elif clip_line:
            yield clip_line
    elif opening.family == "adam":
        surged = surge_of(opening)
        yield from _for_a_reason(look, surged) if surged else (rate_line,)
        if facts.clip is None and not own_clip:
            to = _twice_usual(incident, history)
            each = f"clip each step{f' to a norm of {to}' if to else ' by norm'}"
            yield f"If single batches cause it, {each}; {_no_cure(facts)}."
    else:
        yield from filter(None, (clip_line, rate_line))


def _for_a_reason(line: str, why: str) -> tuple[str, ...]:
    return (f"{line} {why}",) if line else ()


def _structure(facts: Facts) -> Iterator[str]:
    if not facts.normalised and facts.depth > _DEEP:
        yield f"Add normalisation: the model has {facts.depth} weight matrices and no normalisation."


def _scale(history: History, opening: Opening) -> Iterator[str]:
    """Yield what is too large from the beginning: one matrix, all of them, or the targets."""
    times = number(opening.large, 2)
    if opening.large_layer is not None:
        yield (
            f"Initialise {opening.large_layer} anew: for its number of inputs, its weights are {times} times as large as "
            "those of the median layer."
        )
    elif opening.large > 1:
        yield f"Initialise the weights anew, by He or Xavier: for their number of inputs, they are {times} times the usual size."
    elif scaled := scale_of_targets(history):
        yield scaled


def _odd_batches(incident: Incident, history: History) -> Iterator[str]:
    """Yield what keeps single odd batches from doing harm."""
    facts = history.facts
    if history.clips_each_step:
        return
    if bound := _twice_usual(incident, history):
        why = ""
        if facts.family == "adam":
            why = f": {facts.optimizer} makes shorter steps for long after a gradient that large"
        yield f"If such batches recur, clip each step to a norm of {bound}{why}."
    if facts.clip is not None:
        yield (
            "Auto-clip leaves single batches alone, except soon after an explosion; to act on each of them: "
            'attach(model, clip=AutoClip("norm", when="spike")).'
        )


def _twice_usual(incident: Incident, history: History) -> str:
    """Return a bound for norms that leaves usual steps alone, in words; "" if it is not known."""
    usual = usual_norms_of(history, incident.opened_step)
    return "" if usual is None else f"{number(2 * usual.high, 2)}, twice what is usual here"


def _no_cure(facts: Facts) -> str:
    who = f"{facts.optimizer} divides" if facts.family == "adam" else "optimizers like Adam divide"
    why = f"because {who} gradients by their own size"
    return f"a clip does not repair a rate that is too high for long, {why}"


def _nonfinite(incident: Incident, history: History) -> Iterator[str]:
    facts = history.facts
    scaled = history.row.provenance.source == "left out by the scaler"
    if incident.origin is not None:
        pass  # the operation is known
    elif incident.phase == "loss" and scaled:
        yield (
            "float16 overflows in the forward pass, above 65,504: no loss scale can help. Use bfloat16, or run the layer that "
            "overflows in float32."
        )
    elif incident.phase == "loss":
        yield (
            "Look for log(0), sqrt(0), a division by zero or exp of a large number in the loss, and for NaN or infinity in the "
            "batch."
        )
    elif incident.phase == "weight":
        yield "Go back to the last checkpoint with finite weights: no update repairs a NaN weight."
    else:
        yield _behind(incident, history)
    lost = min((sign.step for sign in incident.signs if sign.code == "GW202"), default=None)
    if lost is not None and incident.phase != "weight":
        first = min(incident.opened_step, *(sign.step for sign in incident.signs if sign.kind == "nonfinite"))
        back = "Begin anew" if first < BORN else f"Go back to a checkpoint from before step {first}"
        yield f"{back}: weights hold NaN or infinity since step {lost}, and no update repairs them."
    arrives = any(sign.code in ("GW202", "GW302") for sign in incident.signs)  # only such steps are left out
    if facts.clip is None and not scaled and arrives:
        yield 'Skip such steps: with attach(model, clip="norm"), they leave parameters and optimizer state untouched.'


def _look_closer(incident: Incident) -> Iterator[str]:
    if incident.origin is None:
        yield "Run that one batch under gradwatch.find_nonfinite(model), which names the operation."


def _behind(incident: Incident, history: History) -> str:
    """Return where gradients became non-finite: behind the first layer in backward order that has them."""
    suspect = incident.suspect
    if suspect not in history.layers:
        return "Look at the operations between the model's output and the loss: sqrt or division at zero, log, a masked NaN."
    place = int(history.order[history.layers.index(suspect)])
    module = suspect.rpartition(".")[0] or suspect
    before = [name for name, order in zip(history.layers, history.order, strict=True) if order < place]
    outside = [name for name in before if (name.rpartition(".")[0] or name) != module]
    if not outside:
        return (
            f"Look at what comes behind {module}, between its output and the loss: NaN in the targets that is masked too late, "
            "sqrt, norm or division at zero, log."
        )
    return (
        f"Look at the operations behind {module}, between it and the layers nearer to the loss: sqrt, norm or division at zero, "
        "log, a fully masked attention row."
    )
