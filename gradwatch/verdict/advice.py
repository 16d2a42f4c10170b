"""Advice on an incident, given the model, the optimizer and the evidence.

The remedies come from the literature: Pascanu et al. 2013 (clipping by norm), Brownlee 2019 (the practitioners' list),
Zhang & Sennrich 2019, Wortsman et al. 2023, arXiv:2309.14322 (rates and warm-up for Adam).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Facts, Incident

_MOST = 4


def advise(incident: Incident, history: History, remedies: Mapping[str, str]) -> tuple[str, ...]:
    """Return at most four pieces of advice, the most likely to help first.

    Args:
        incident: the incident to advise on.
        history: the history of the run, whose facts describe the model and the optimizer.
        remedies: the remedies of rules, by code.
    """
    lines: list[str] = []
    codes = dict.fromkeys(sign.code for sign in incident.signs)
    told = [remedies[code].format(suspect=incident.suspect) for code in codes if remedies.get(code)]
    for line in _lines(incident, history, told):
        if line not in lines:
            lines.append(line)
    return tuple(lines[:_MOST])


def _lines(incident: Incident, history: History, told: Sequence[str]) -> Iterator[str]:
    facts = history.facts
    if incident.origin is not None:
        yield from incident.origin.advice
    if incident.kind in ("exploding", "diverging"):
        yield from _explosion(history, facts)
        yield from told
    elif incident.kind == "nonfinite":
        yield from _nonfinite(incident, facts)
    elif incident.kind == "spike":
        yield "Look at the batch of this step: a single jump that comes back is usually caused by one unusual batch."
        if facts.family != "adam":
            yield 'If it happens again, clip by norm when it does: attach(model, clip="norm").'
    elif incident.kind == "stalled":
        yield from told
        yield "Overfit one batch first: if the loss stays high there too, the fault is in the program, not in the data."
        yield f"Change the learning rate ({_rate(facts)}) by factors of three in both directions."
        yield "Scale the inputs to zero mean and unit variance."
    elif incident.kind == "vanishing":
        if facts.recurrent and not facts.gated:
            yield "Use an LSTM or GRU instead of the vanilla RNN."
        yield "Use ReLU-like activations instead of sigmoid or tanh, with He initialisation."
        yield "Add residual connections or normalisation, or use fewer layers."
    elif incident.kind == "dead":
        yield f"Lower the learning rate ({_rate(facts)}): ReLU units usually die from a single large step."
        yield "Use LeakyReLU or GELU, and scale the inputs."
        yield "If a whole layer is dead, look for a detach() or an output that the loss does not use."
    elif incident.kind == "frozen":
        yield "Build the optimizer from model.parameters() after the model is final."
        yield "Check the learning rate of this layer's parameter group and its schedule."
        yield "Keep a float32 copy of half-precision weights: small updates are lost to rounding."


def _explosion(history: History, facts: Facts) -> Iterator[str]:
    if math.isfinite(history.reference_loss) and history.reference_loss > 1e3:
        yield f"Scale the targets: the loss began at {history.reference_loss:.3g}, so the gradients are large too."
    if facts.family == "adam":
        yield (
            f"Lower the learning rate ({_rate(facts)}) or warm it up over the first few hundred steps; clipping does not "
            f"repair this, because {facts.optimizer} divides gradients by their own size."
        )
    elif facts.clip is None:
        yield 'Clip by norm when it happens: attach(model, clip="norm").'
    if facts.recurrent:
        if not facts.gated:
            yield "Use an LSTM or GRU instead of the vanilla RNN."
        yield "Shorten the sequences: truncate backpropagation through time."
    if facts.family != "adam":
        yield f"Lower the learning rate ({_rate(facts)}), or warm it up."
    if not facts.normalised and facts.depth > 10:
        yield f"Add normalisation or residual connections: the model has {facts.depth} weight matrices and no normalisation."


def _nonfinite(incident: Incident, facts: Facts) -> Iterator[str]:
    if incident.origin is not None:
        pass  # the operation is known
    elif incident.phase == "loss":
        yield "Look for log(0), sqrt(0), a division by zero or exp of a large number in the loss, and for NaN in the batch."
    elif incident.phase == "weight":
        yield "Go back to the last checkpoint with finite weights: no update repairs a NaN weight."
    else:
        yield (
            f"Look at the operations around {incident.suspect or 'the first layer named'}: sqrt, norm or division at zero, "
            "log, a fully masked attention row."
        )
    if facts.clip is None:
        yield 'Skip such steps: attach(model, clip="norm") leaves parameters and optimizer state untouched.'
    if incident.origin is None:
        yield "Run that one batch under gradwatch.find_nonfinite(model), which names the operation."


def _rate(facts: Facts) -> str:
    return f"now {facts.rate:.3g}" if math.isfinite(facts.rate) else "of its parameter group"
