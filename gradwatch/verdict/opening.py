"""What was known of a run when an incident opened. Advice goes by it: later, rates and weights are those of the damage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.optimizer_rows import rows_by_optimizer
from gradwatch.history.statistics import ignore_fp_warnings, median

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Family, Floats

_FIRST = 12  # steps in which the weights are still those of the initialisation
_ODD = 10.0  # gain of one matrix, relative to the median one, beyond which it is named
_LARGE = 4.0  # median gain beyond which all matrices are too large; usual initialisations have 0.6 to 1.4
_SMALL = 0.3  # median gain below which all matrices are too small
_REMEMBERED = 32  # earlier updates that still move the weights by momentum
_JUMP = 3.0  # factor by which a rate rises in a single step only if it is set anew: a warm-up rises by two at most
_BEFORE = 8  # rows before such a rise
_RISING = 1.5  # multiple of the first rate from which a rate that is at its highest is rising
_AHEAD = 2.0  # multiple of the highest rate so far from which on the one that is set is still to come
_BORNE = 0.1  # share of its weights that an update of SGD may change in the first steps
_USUAL_UPDATE = 1e-3  # share of its weights that an update usually changes


@dataclass(frozen=True)
class Opening:
    """The run at the opening of an incident.

    Attributes:
        step: the step.
        family: family of the optimizer of that step, or of the run's where it is not known; "other" if another optimizer holds
            the suspect.
        rate: learning rate of the suspect, or the largest one if there is none; NaN if none is known.
        burst: highest learning rate of the last updates that was far above those before and after them; NaN otherwise.
        burst_at, burst_until: first and last step of these updates.
        first_rate: first learning rate above zero; NaN if none is known.
        top_rate: largest learning rate so far; minus infinity if none is known.
        raised_from, raised_to, raised_at: the largest rate of the 8 rows or more before, that since, and the step, if the
            learning rate of the optimizer that holds the suspect has risen at once within its last 32 rows; else NaN and -1.
        first_borne: learning rate of SGD at which the first update would have changed a tenth of a matrix, the one that it
            changed most (``first_base``, in words); NaN after the first steps, or if it is not known.
        momentum: momentum of SGD; 0.0 if there is none, or it is not known.
        large: times by which weights are too large for their number of inputs, in the first steps; NaN if they are not.
        large_layer: the only matrix of which that is so, compared with the median one; None: all are, compared with a usual one.
        moved_layer: the matrix that moved farther than rate and gradients explain; None: none did, or it is not known.
        moved: times as far as they explain at most.
        usual_rate: learning rate at which an update would change a thousandth of the suspect, or of the largest matrix if there
            is none (``usual_layer``); NaN if it is not known.
        zeros: names of matrices all of whose weights are zero, and that get no gradient.
        gain: median gain of the matrices if it is far below a usual one; NaN if it is not.
        surge: most times by which the gradient norm of the suspect has grown from one step to the next since the first sign,
            after the first steps of the run, and the step to which (``surged_at``); NaN and -1 if it is not known.
        rising: whether the learning rate was at its highest within the last 50 rows, and well above the first.
        shaken: whether an explosion came with the first steps.
        aim: the rate that is set, on the way to which a warm-up was; NaN if it was not, or it is not known.
        predicted: the decrease of the loss that the update of SGD predicts, over the loss; NaN if it is not known.
    """

    step: int
    rate: float
    family: Family = "other"
    burst: float = math.nan
    burst_at: int = -1
    burst_until: int = -1
    first_rate: float = math.nan
    top_rate: float = -math.inf
    large: float = math.nan
    large_layer: str | None = None
    usual_rate: float = math.nan
    usual_layer: str = ""
    moved_layer: str | None = None
    moved: float = math.nan
    raised_from: float = math.nan
    raised_to: float = math.nan
    raised_at: int = -1
    first_borne: float = math.nan
    momentum: float = 0.0
    first_base: str = ""
    zeros: tuple[str, ...] = ()
    gain: float = math.nan
    surge: float = math.nan
    surged_at: int = -1
    rising: bool = False
    shaken: bool = False
    aim: float = math.nan
    predicted: float = math.nan

    @property
    def young(self) -> bool:
        """True in the first steps of the run."""
        return self.step < _FIRST


def opening_of(history: History, suspect: str | None, since: int | None = None) -> Opening:
    """Return what is known now, at the opening of an incident with this suspect and its first sign at step ``since``."""
    step, column = history.row.step, history.layers.index(suspect) if suspect in history.layers else None
    elsewhere = column is not None and not math.isfinite(history.rate[column]) and bool(np.isfinite(history.rate).any())
    if column is None:
        rate = float(np.fmax.reduce(history.rate, initial=math.nan))
    else:  # optimizers that step one after the other each know the rates of their own layers
        rate = float((history.previous_rate if elsewhere else history.rate)[column])
    layer, times = _too_large(history) if step < _FIRST else (None, math.nan)
    trained = history.matrices & (np.isfinite(history.rate) if np.isfinite(history.rate).any() else True)
    known = trained & ~history.began_at_zero  # those that are still near zero say nothing of a rate
    if history.row.family != "adam":  # and the gradients of those behind them are small as long
        known[history.behind_zeros(trained)] = False
    told_of = column if column is not None else int(np.argmax(np.where(known, history.sizes, 0)))
    usual = _usual_rate(history, told_of) if history.layers and not elsewhere and known[told_of] else math.nan
    moved_layer, moved = _moved_by_another(history)
    raised_from, raised_to, raised_at = _raised(history, column)
    first_borne, first_base = _borne_at_first(history) if step < _FIRST else (math.nan, "")
    gain = _small_gain(history)
    first_rate, top_rate = _rates_of(history, column)
    burst, burst_at, burst_until = _burst(history)
    surge, surged_at = (math.nan, -1) if column is None or step < _FIRST else _surge(history, column, since)
    return Opening(
        step=step,
        rate=rate,
        family="other" if elsewhere else history.facts.family if history.row.family == "other" else history.row.family,
        burst=burst,
        burst_at=burst_at,
        burst_until=burst_until,
        first_rate=first_rate,
        top_rate=top_rate,
        large=times,
        large_layer=layer,
        usual_rate=usual,
        usual_layer=history.layers[told_of] if history.layers else "",
        moved_layer=moved_layer,
        moved=moved,
        raised_from=raised_from,
        raised_to=raised_to,
        raised_at=raised_at,
        first_borne=first_borne,
        momentum=history.facts.momentum if 0 <= history.facts.momentum < 1 else 0.0,
        first_base=first_base,
        zeros=_zeros(history),
        gain=gain,
        surge=surge,
        surged_at=surged_at,
        rising=history.warming_up and rate > _RISING * first_rate,
        aim=history.facts.set_rate if history.facts.set_rate > _AHEAD * top_rate else math.nan,
        predicted=_predicted(history),
    )


def _predicted(history: History) -> float:
    """Return the decrease that this update predicts, over the loss where zero may be its lowest; NaN if it is not known."""
    decrease, loss = history.predicted_decrease, history.row.loss
    known = history.least_loss >= 0 and loss > 0 and bool(np.isfinite(decrease).any())
    return float(np.nansum(decrease) / loss) if known else math.nan


def _burst(history: History) -> tuple[float, int, int]:
    """Return the highest learning rate of a burst within the last 8 rows, which is over, and its first and last step.

    All rates of a burst are far above those before and after. (NaN, -1, -1) if there was none.
    """
    rows = min(_BEFORE, history.task_rows)
    rates, steps = history.learning_rate(last=rows), history.steps(last=rows)
    if rows < 3 or history.holders.turns(history.rows, rows):
        return math.nan, -1, -1
    high = np.flatnonzero(rates > _JUMP * max(rates[0], rates[-1]))
    if not (high.size and min(rates[0], rates[-1]) > 0 and high[-1] - high[0] + 1 == high.size):
        return math.nan, -1, -1
    return float(rates[high].max()), int(steps[high[0]]), int(steps[high[-1]])


def _rates_of(history: History, column: int | None) -> tuple[float, float]:
    """Return the first learning rate above zero and the largest so far; those of its optimizer if a layer is given.

    Of several optimizers that take turns, the rates of the kept rows are known; the first only if all rows are kept.
    """
    parts = rows_by_optimizer(history, history.window)
    mine = next((part.places for part in parts if column is not None and part.held[column]), None)
    if mine is None:
        return history.first_rate, history.top_rate
    rates = history.learning_rate()[mine]
    rates = rates[rates > 0]
    if not rates.size:
        return math.nan, -math.inf
    return float(rates[0]) if history.rows <= history.window else math.nan, float(rates.max())


def _too_large(history: History) -> tuple[str | None, float]:
    """Return the one matrix that began too large beside the others, or None for all, and how many times; NaN if none did."""
    first = history.first_weight  # those of now may be what has exploded
    relative = history.relative_gain(first)
    if np.isfinite(relative).any() and np.nanmax(relative) > _ODD:
        return history.layers[int(np.nanargmax(relative))], float(np.nanmax(relative))
    gain = _gain(history, first)
    return None, gain if gain > _LARGE else math.nan


def _gain(history: History, weight: Floats) -> float:
    """Return the median gain of the matrices with these norms; NaN if none is known."""
    gains = (weight * np.sqrt(history.fan_in / history.sizes))[history.large_matrices]
    gains = gains[np.isfinite(gains)]
    return median(gains) if gains.size else math.nan


def _small_gain(history: History) -> float:
    """Return the median gain of the matrices if it is far below a usual one; else NaN.

    Small weights before a normalisation do no harm, unless they have shrunk since the run began.
    """
    gain = _gain(history, history.weight)
    shrunk = not gain > _gain(history, history.first_weight) / 2
    return gain if 0 < gain < _SMALL and (shrunk or not history.facts.normalised) else math.nan


def _zeros(history: History) -> tuple[str, ...]:
    zero = history.large_matrices & (history.weight == 0) & ~(history.row.grad_norm > 0)
    return tuple(history.layers[column] for column in np.flatnonzero(zero).tolist())


def _surge(history: History, column: int, since: int | None) -> tuple[float, int]:
    norms, steps = history.grad_norm(last=history.task_rows)[:, column], history.steps(last=history.task_rows)
    known = ~np.isnan(norms)  # not in the rows of another optimizer
    norms, steps = norms[known], steps[known]
    rows = 1 if since is None else int(np.count_nonzero(steps[-_BEFORE:] >= since))
    rows = min(max(rows, 1) + 1, len(steps))
    norms, steps = norms[len(norms) - rows :], steps[len(steps) - rows :]
    with ignore_fp_warnings():
        times = norms[1:] / np.where(norms[:-1] > 0, norms[:-1], np.nan)
        times[~np.isfinite(times)] = 0.0
    most = int(np.argmax(times)) if times.size else -1
    return (float(times[most]), int(steps[most + 1])) if times.size and times[most] > 0 else (math.nan, -1)


def _raised(history: History, column: int | None) -> tuple[float, float, int]:
    """Return the rates from and to which the learning rate has risen at once, and the step; (NaN, NaN, -1) if it has not.

    All rates before are lower by the factor, and all since are higher. Of optimizers that take turns, the rows count in which
    the layer of ``column`` has a gradient.
    """
    rates, steps = history.learning_rate(last=history.task_rows), history.steps(last=history.task_rows)
    if column is not None:
        mine = ~np.isnan(history.grad_norm(last=history.task_rows)[:, column])
        rates, steps = rates[mine], steps[mine]
    rows = min(len(rates), _REMEMBERED + _BEFORE)
    borne = float(np.fmax.reduce(rates[: len(rates) - rows], initial=-math.inf))  # such as before a warm restart
    rates, steps = rates[-rows:], steps[-rows:]
    if rows <= _BEFORE or not (rates > 0).all():
        return math.nan, math.nan, -1
    highest, lowest = np.maximum.accumulate(rates), np.minimum.accumulate(rates[::-1])[::-1]
    times = (lowest[1:] / highest[:-1])[_BEFORE - 1 :]
    at = int(np.argmax(times)) + _BEFORE
    raised = times[at - _BEFORE] > _JUMP and not borne >= lowest[at]
    return (float(highest[at - 1]), float(rates[at]), int(steps[at])) if raised else (math.nan, math.nan, -1)


def _borne_at_first(history: History) -> tuple[float, str]:
    """Return the rate at which the first update of SGD would have changed a tenth of a matrix, and the matrix in words.

    No earlier update has made that gradient larger, as those of an explosion are.
    """
    rows = history.task_rows
    if history.row.family != "sgd" or not rows or rows > len(history.steps()):
        return math.nan, ""
    norms = history.grad_norm(last=rows)[0] * (
        history.clip_coefficient(last=rows)[0] if rows > 1 else history.row.applied
    )
    with ignore_fp_warnings():
        weights = history.weight_norm(last=rows)[0]
        borne = _BORNE * np.maximum(weights, history.half_usual) / norms
    borne[~(history.large_matrices & (borne > 0))] = np.inf  # an infinite gradient says nothing of a rate
    least = int(np.argmin(borne))
    if not np.isfinite(borne[least]):
        return math.nan, ""
    small = bool(weights[least] < history.half_usual[least])
    return float(borne[least]), weights_in_words(history.layers[least], small=small)


def weights_in_words(layer: str, *, small: bool) -> str:
    """Return what the length of an update of a layer is compared with; ``small``: its weights are below half of a usual start."""
    return f"half of a usual initialisation of {layer}" if small else f"the weights of {layer}"


def beyond_gradients(history: History) -> Floats:
    """Return `moved_over_possible` of each matrix that is not small, shape (L,); 0.0 for others, and where it is not known."""
    times = moved_over_possible(history)
    return np.where(history.large_matrices & np.isfinite(times), np.maximum(times, 0.0), 0.0)


def moved_over_possible(history: History) -> Floats:
    """Return how far each norm has changed since the sample before, over what updates can have done at most, shape (L,).

    With momentum ``m``, SGD moves the weights by at most ``1 / (1 - m)`` times the length of a gradient. Adam changes each by at
    most ``(1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2))`` times the rate (Cauchy-Schwarz over its two averages), and by
    its decay, which only shrinks them. NaN where it is not known.
    """
    if history.row.family == "adam":
        return _grown_over_rate(history)
    unknown = np.full(len(history.layers), np.nan)
    rows = min(history.weight_gap + _REMEMBERED, history.task_rows)
    steps, norms = history.steps(last=rows), history.grad_norm(last=rows)[:-1]
    momentum = history.facts.momentum
    if history.row.family != "sgd" or not len(norms) or steps[-1] - steps[0] >= rows or not 0 <= momentum < 1:
        return unknown
    with ignore_fp_warnings():
        rates = history.learning_rate(last=rows)
        highest = history.rate * np.fmax.reduce(rates) / rates[-1]  # a rate that was cut meanwhile was higher before
        explained = highest * np.nansum(norms, axis=0) / (1 - momentum)
        times: Floats = np.abs(history.weight - history.previous_weight) / explained
    return times


def _grown_over_rate(history: History) -> Floats:
    """Return how far each norm has grown since the sample before, over what Adam's rate allows, shape (L,)."""
    unknown = np.full(len(history.layers), np.nan)
    betas, rows = history.facts.betas, history.weight_gap + 1
    known = betas is not None and history.facts.optimizer in ("Adam", "AdamW") and betas[0] ** 2 < betas[1] < 1
    if betas is None or not known or rows > history.task_rows:
        return unknown
    with ignore_fp_warnings():
        rates = history.learning_rate(last=rows)
        each = (1 - betas[0]) / math.sqrt((1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]))
        most = each * history.weight_gap * np.fmax.reduce(np.abs(rates))
        times: Floats = (history.weight - history.previous_weight) / (most * np.sqrt(history.sizes))
    return times


def _moved_by_another(history: History) -> tuple[str | None, float]:
    """Return the matrix that moved most beyond what SGD can have done, and how many times as far; (None, NaN) if none did."""
    times = beyond_gradients(history)
    most = int(np.argmax(times))
    return (history.layers[most], float(times[most])) if times[most] > 1 else (None, math.nan)


def _usual_rate(history: History, column: int) -> float:
    length = math.sqrt(history.sizes[column]) if history.row.family == "adam" else history.row.grad_norm[column]
    known = history.row.family in ("sgd", "adam") and length > 0
    return float(_USUAL_UPDATE * history.weight[column] / length) if known else math.nan
