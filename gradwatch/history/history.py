"""The past of a run, which rules read: its last rows, and the reference values learned from them.

While a run goes on, only the pipeline and the fast path write it. What makes a history (the monitor, the reader of run logs,
the cases of rules) fills it before, and the monitor restores saved states.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.history.columns import weights_of, widened
from gradwatch.history.gradient_norms import GradientNorms
from gradwatch.history.saved import FIRST_LOSSES, read_state
from gradwatch.history.statistics import Typical, median
from gradwatch.records import Facts, NonFinite, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gradwatch.history.columns import Columns
    from gradwatch.records import Floats

_SURE = 32  # losses below zero after which a cross-entropy is known to be none
_SMALLEST = 16  # fewest elements of a matrix whose norm is meaningful
_WARM = 50  # rows without a new maximum after which the learning rate counts as settled
RECENT = 100  # rows over which fast growth of weights is measured


class History(GradientNorms):
    """The last ``window`` rows of ``L`` layers.

    Args:
        layers: names of the columns, in registration order.
        sizes: number of elements per layer, shape (L,).
        matrices: whether each layer has two or more dimensions, shape (L,). Biases and gains behave differently.
        fan_in: number of inputs of each unit, per layer, shape (L,).
        window: number of rows to keep. Fewer are kept (at least 64) if they would take over 16 MB.

    Attributes:
        weight_of: column of the weight that each bias or gain belongs to, shape (L,); -1 where there is none.
    """

    def __init__(
        self,
        layers: Sequence[str],
        sizes: Sequence[int] | None = None,
        matrices: Sequence[bool] | None = None,
        fan_in: Sequence[int] | None = None,
        window: int = 1024,
    ) -> None:
        self.layers = tuple(layers)
        count = len(self.layers)
        super().__init__(count, window)
        self.sizes = np.asarray(sizes if sizes is not None else [1024] * count, dtype=np.float64)
        self.matrices = np.asarray(matrices if matrices is not None else [True] * count, dtype=bool)
        self.fan_in = np.asarray(fan_in if fan_in is not None else [10] * count, dtype=np.float64)
        self.weight_of = weights_of(self.layers, self.matrices.tolist())
        self.order: NDArray[np.intp] = np.arange(count)[::-1].copy()
        self.facts = Facts()
        self.typical_weight = Typical(count, half_life=16)
        self.weight: Floats = np.full(count, np.nan)
        self.previous_weight: Floats = np.full(count, np.nan)
        self.least_weight: Floats = np.full(count, np.nan)
        self.began_at_zero = np.zeros(count, dtype=bool)  # layers whose first weights were all zero
        self.weight_gap = 1
        self._weight_step = 0
        self._all_finite = np.zeros(count, dtype=np.uint8)
        self.nonfinite = self._all_finite
        self.nonfinite_weight = np.zeros(count, dtype=bool)
        self.buffers_bad_since: int | None = None  # step of the sample since which a buffer is not finite
        self.dead_share: Floats = np.full(count, np.nan)
        self.unchanged: Floats = np.full(count, np.nan)
        self._compared = 0  # number of rows when the weights were last compared
        self.rate: Floats = np.full(count, np.nan)
        self.previous_rate: Floats = self.rate
        self._top_rate, self._rose_at = -math.inf, 0
        self.first_rate = math.nan  # the first one above zero
        self.still_since: int | None = None  # step since which every learning rate is 0

    # Writing.

    def know_order(self, order: NDArray[np.intp]) -> None:
        """Set the order in which gradients arrive in backward, shape (L,)."""
        self.order = order

    def know(self, facts: Facts) -> None:
        """Replace what is known of the model and its optimizer."""
        self.facts = facts

    def push(self, row: Row) -> None:
        """Add a row. Non-finite values are kept in the ring but excluded from every reference value."""
        self._push_row(row)
        self._take_loss(row)
        self.nonfinite = row.nonfinite if row.nonfinite is not None else self._all_finite
        if row.order is not None:
            self.order = row.order
        self.previous_rate = self.rate
        if row.rate is not None and row.rate is not self.rate:
            self.rate = row.rate
            top = self._largest_rate
            if not math.isnan(top):  # unknown, or all layers are frozen
                self.facts = replace(self.facts, rate=max(top, 0.0))
            if math.isnan(self.first_rate) and top > 0:
                self.first_rate = top
            if top != 0:
                self.still_since = None
            elif self.still_since is None:
                self.still_since = row.step
            if top > 1.0001 * self._top_rate:
                self._top_rate, self._rose_at = top, self.rows
        if row.buffers_well is not None:
            since = row.step if self.buffers_bad_since is None else self.buffers_bad_since
            self.buffers_bad_since = None if row.buffers_well else since
        if row.dead_share is not None:
            self.dead_share = row.dead_share
        if row.unchanged is not None:
            self.unchanged, self._compared = row.unchanged, self.rows
        if row.weight_norm is not None:
            self._take_weight(row, row.weight_norm)

    def note(
        self,
        step: int,
        loss: float,
        grad_norm: Floats,
        columns: NDArray[np.intp] | None,
        applied: float,
        rate: float = math.nan,
    ) -> None:
        """Add a row that need not be judged: it is finite and equals the previous one except for the given values.

        Args:
            step: optimizer step of the row.
            loss: its loss; NaN if none was seen.
            grad_norm: gradient norms of the layers in ``columns``, shape (n,).
            columns: columns of ``grad_norm``, shape (n,); None: all layers.
            applied: factor that the user's clip put on the gradients.
            rate: largest learning rate of its optimizer.
        """
        if columns is not None:
            spread = np.full(len(self.layers), np.nan)
            spread[columns] = grad_norm
            grad_norm = spread
        self._note_row(step, loss, grad_norm, applied, rate)
        self.losses += self._row.has_loss
        self._to_learn = self.rows

    def _take_weight(self, row: Row, weight: Floats) -> None:
        self.began_at_zero |= np.isnan(self.weight) & (weight == 0)
        self.previous_weight, self.weight = self.weight, weight
        self.least_weight = np.fmin.reduce(self.weight_norm(last=min(RECENT, self.task_rows)), axis=0)
        self.weight_gap, self._weight_step = max(1, row.step - self._weight_step), row.step
        if row.nonfinite_weight is not None:
            self.nonfinite_weight = row.nonfinite_weight

    def grow(self, columns: Columns) -> None:
        """Extend the history to the columns of added layers. Their past values are missing, and a new task begins."""
        self.layers = tuple(columns.names)
        count = len(self.layers)
        self.sizes = np.asarray(columns.sizes, dtype=np.float64)
        self.matrices = np.asarray(columns.matrices, dtype=bool)
        self.fan_in = np.asarray(columns.fan_in, dtype=np.float64)
        self.weight_of = weights_of(self.layers, self.matrices.tolist())
        self.order = widened(self.order, count, count)
        for name in ("weight", "previous_weight", "least_weight", "dead_share", "unchanged", "rate", "previous_rate"):
            setattr(self, name, widened(getattr(self, name), count, np.nan))
        self._all_finite = np.zeros(count, dtype=np.uint8)
        self.nonfinite = widened(self.nonfinite, count, 0)
        self.nonfinite_weight = widened(self.nonfinite_weight, count, 0)
        self.began_at_zero = widened(self.began_at_zero, count, 0)
        self._widen(count)
        self.begin_next_task()

    def begin_task(self, row: Row) -> None:
        """Begin a new task with the last row, ``row``, which is there already, as added or replaced layers do."""
        self.begin_next_task()
        self._task = self._learned = self.rows - 1
        self._take_loss(row)
        if row.weight_norm is not None:
            self._take_weight(row, row.weight_norm)

    def begin_next_task(self) -> None:
        """Begin a new task with the next row: a new task or new layers change the scale of the loss and the gradients."""
        count = len(self.layers)
        self._task = self.rows
        self._forget_norms(count)
        self.typical_weight = Typical(count, half_life=16)
        self.weight, self.previous_weight, self.least_weight = np.full((3, count), np.nan)
        self._forget_losses()

    # Reading.

    @property
    def opposed(self) -> bool:
        """True once two optimizers are known to take turns, where the loss of one runs through what the other trains."""
        since = self.facts.opposed_since
        return since is not None and self.row.step >= since

    @property
    def clips_each_step(self) -> bool:
        """True if every step is clipped, by the user or by auto-clip with ``when="always"``."""
        return self.facts.clips_always or self.clipped_by_user

    @property
    def clipped_by_user(self) -> bool:
        """True if the last row was measured before a clip of the user's own."""
        return self.row.provenance.clipped == "before the user's clip"

    def unchanged_by(self, column: int) -> int | None:
        """Return the number of gradients above zero that are known not to have changed a layer; None if none was measured.

        Those since its weights were last compared do not count.
        """
        unchanged, since = self.unchanged[column], self.rows - self._compared
        norms = self.grad_norm(last=int(unchanged) + 1 + since if unchanged > 0 else None)[:, column]
        if np.isnan(norms).all():
            return None
        return int(np.count_nonzero(norms[: max(0, len(norms) - since - 1)] > 0))

    @property
    def measured(self) -> bool:
        """True if a layer had a gradient in the last row, be it one that is not finite."""
        return bool(self.nonfinite.any() or not np.isnan(self.row.grad_norm).all())

    @property
    def arriving(self) -> NDArray[np.bool_]:
        """True for layers whose last gradient norm is not zero, or missing although a gradient has arrived before, shape (L,)."""
        some = self.row.grad_norm > 0
        return some if self.row.arrived is None else some | (self.row.arrived & np.isnan(self.row.grad_norm))

    @property
    def decrease_rates(self) -> Floats:
        """The factor on each layer's squared gradient norm that gives the first-order decrease of the loss, shape (L,).

        It is the learning rate for SGD. NaN for other optimizers, if it raises the loss, if the gradients may not stem from the
        loss that was seen, and if a loss below zero was seen, since zero is then no lower bound.
        """
        row = self.row
        lowers = row.family == "sgd" and not self.facts.maximizes
        if not lowers or row.provenance.loss in ("none", "monitor.loss()") or not self.least_loss >= 0:
            return np.full(len(self.layers), np.nan)
        return self.rate

    @property
    def predicted_decrease(self) -> Floats:
        """The first-order decrease of the loss by this step of SGD, per layer: ``lr ||g||^2``, shape (L,); NaN if not known."""
        part: Floats = self.decrease_rates * np.square(self.row.applied * self.row.grad_norm)
        return part

    @property
    def top_rate(self) -> float:
        """The largest learning rate so far; minus infinity if none is known."""
        return self._top_rate

    @property
    def warming_up(self) -> bool:
        """True if the learning rate reached a new maximum of the run within the last 50 rows."""
        return self.rows - self._rose_at < _WARM

    @property
    def zero_rate_since(self) -> tuple[int, bool] | None:
        """The step since which every learning rate is 0, and whether it was above 0 just before; None if one is not 0.

        False if it may have been 0 for longer, because the rows before are not kept.
        """
        if self.still_since is None:
            return None
        rates, steps = self.learning_rate(), self.steps()
        above = np.flatnonzero(rates != 0)
        if above.size == 0:
            return int(steps[0]), bool(steps[0] == 0)
        if above[-1] + 1 == len(steps):  # of the last row, it is not known
            return self.still_since, False
        return int(steps[above[-1] + 1]), bool(rates[above[-1]] > 0)

    @property
    def rows_at_top_rate(self) -> int:
        """The number of rows since the learning rate last reached a new maximum of the run, that row included."""
        return self.rows - self._rose_at + (self._rose_at > 0)

    @property
    def chance_loss(self) -> float:
        """The cross-entropy of guessing among all classes; NaN if their number is not known.

        That is the number of predictions that a loss of cross-entropy compares, or else of units of the last matrix.
        """
        if self.facts.loss == "cross-entropy" and len(self.facts.prediction) > 1:
            return math.log(max(self.facts.prediction[1], 1))
        if not self.matrices.any():
            return math.nan
        last = int(np.argmin(np.where(self.matrices, self.order, np.inf)))
        return math.log(max(self.sizes[last] / self.fan_in[last], 1.0))

    @property
    def sees_loss(self) -> bool:
        """Whether the losses of rows are what a loss of torch has returned, alone and without a factor but the loss scale."""
        behind = self.facts.behind
        seen = behind == "nothing" or (behind == "a factor" and math.isfinite(self.row.loss_scale))
        return seen and bool(self.facts.loss) and self.row.provenance.loss in ("backward root", "closure")

    @property
    def is_raised(self) -> bool:
        """True if the optimizer, the only one in the first steps, raises what is known to be a loss."""
        seen = self.facts.behind == "a minus sign" if not self.facts.maximizes else self.sees_loss
        return seen and bool(self.facts.loss) and self.losses >= FIRST_LOSSES

    @property
    def is_no_entropy(self) -> bool:
        """True if the last 32 losses are known to be cross-entropies, binary or not, and are below zero, as none can be."""
        if not (self.row.loss < 0 and self.sees_loss and self.facts.loss in ("cross-entropy", "binary cross-entropy")):
            return False
        last = self.task_loss(last=_SURE)  # within as many steps it is seen that the loss is another one
        return len(last) == _SURE and bool((last < 0).all())

    @property
    def goes_uphill(self) -> bool:
        """True if the last step was made at learning rates below zero, of all groups: one alone may be meant to ascend."""
        return bool((self.rate < 0).any()) and not bool((self.rate > 0).any())

    @property
    def guessing(self) -> float:
        """The loss of guessing, if the losses of rows are known to be means of cross-entropies; else NaN."""
        if not (self.facts.mean and self.sees_loss):
            return math.nan
        binary = self.facts.loss == "binary cross-entropy"
        return math.log(2) if binary else self.chance_loss if self.facts.loss == "cross-entropy" else math.nan

    def is_good_cross_entropy(self, loss: float) -> bool:
        """Return whether ``loss`` is known to be good: a cross-entropy of less than half that of guessing."""
        return loss < self.guessing / 2

    @property
    def large_matrices(self) -> NDArray[np.bool_]:
        """Whether each layer is a matrix of at least 16 elements, shape (L,): few weights may well change by their own size."""
        return self.matrices & (self.sizes >= _SMALLEST)

    @property
    def half_usual(self) -> Floats:
        """Half the norm of a matrix after a usual initialisation, shape (L,): a lower bound for layers that start near zero."""
        return 0.5 * np.sqrt(self.sizes / self.fan_in)

    @property
    def first_weight(self) -> Floats:
        """The weight norms of the first kept row, where they were sampled, and else the last ones, shape (L,)."""
        first = self.weight_norm(last=self.task_rows)[0]
        return np.where(np.isnan(first), self.weight, first)

    def behind_zeros(self, told: NDArray[np.bool_]) -> list[int]:
        """Return the columns that come next on the way back after a layer that began at zero, of those of ``told`` (L,)."""
        chain = np.argsort(self.order)
        chain = chain[told[chain]]
        columns: list[int] = chain[1:][self.began_at_zero[chain[:-1]]].tolist()
        return columns

    def relative_gain(self, weight: Floats | None = None) -> Floats:
        """Return the gain of each matrix divided by the median gain (at least 0.5), shape (L,); of the last weights by default.

        The gain is ``||w|| sqrt(f / n)``, with ``f`` inputs per unit and ``n`` elements: near 1 after a usual initialisation,
        whatever the shape. NaN for layers that are not large matrices, and for all layers if fewer than three are.
        """
        gain = (self.weight if weight is None else weight) * np.sqrt(self.fan_in / self.sizes)
        gain[~self.large_matrices] = np.nan
        finite = gain[np.isfinite(gain)]
        if len(finite) < 3:
            gain[:] = np.nan
            return gain
        relative: Floats = gain / max(median(finite), 0.5)
        return relative

    @property
    def damage_seen(self) -> str:
        """What was not finite when rows last looked at weights and buffers, in words; empty if all was."""
        bad = np.flatnonzero(self.nonfinite_weight)
        if bad.size:
            return f"parameter {self.layers[int(bad[0])]} was not finite when it was last checked"
        return "" if self.buffers_bad_since is None else "a buffer was not finite when it was last checked"

    def first_nonfinite(self) -> str | None:
        """Return the first layer, in backward order, whose last gradient has NaN or Inf; None if there is none."""
        hit = np.flatnonzero(self.nonfinite != NonFinite.NONE)
        if not hit.size:
            return None
        return self.layers[int(hit[np.argmin(self.order[hit])])]

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Return the reference values of the run as plain lists and numbers, without the rows."""
        return {
            "layers": list(self.layers),
            "losses": self.losses,
            "first_losses": list(self._first_losses),
            "typical_grad": self.typical_grad.state_dict(),
            "typical_weight": self.typical_weight.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UsageError: the state is damaged or belongs to other layers. Nothing is restored then.
        """
        saved = read_state(state, self.layers)
        self.losses = saved.losses
        self._know_first_losses(saved.first_losses)
        self.typical_grad.load_state_dict(saved.typical_grad)
        self.typical_weight.load_state_dict(saved.typical_weight)
