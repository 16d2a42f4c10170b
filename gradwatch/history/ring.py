"""The ring of the last rows, and the run's own reference values.

Rules read it; nobody but the pipeline writes it. Missing values are NaN; every view is read-only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradwatch.history.columns import widened
from gradwatch.history.saved import FIRST_LOSSES, read_state
from gradwatch.history.statistics import Typical, median, median_and_mad, quiet_numpy
from gradwatch.records import Facts, NonFinite, Provenance, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gradwatch.history.columns import Columns
    from gradwatch.records import Floats

_BUDGET = 16 * 2**20  # bytes of ring; 1,024 rows of 300 layers take 5 MB
_SMALLEST = 16  # elements of a matrix that can be told by its norm
_WARM = 50  # rows after which a rate that was not raised is taken for settled
_RECENT = 100  # rows in which weights may have grown quickly
SETTLED = 8  # norms before which a layer has no usual one
EARLY = 12  # losses before which there is no usual scatter yet


class Copied(NamedTuple):
    """Rows as they stood in the ring, oldest first: (n,) each, and (n, L)."""

    steps: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    coefficient: Floats
    skipped: NDArray[np.bool_]
    grad_norm: Floats


class History:
    """The last ``window`` rows of ``L`` layers.

    Args:
        layers: the names of the columns, in registration order.
        sizes: elements per layer, shape (L,).
        matrices: True for layers with two or more dimensions, shape (L,). Biases and gains follow other laws.
        fan_in: inputs of each unit of a layer, shape (L,).
        window: rows to keep; fewer when ``L`` is so large that they would take over 16 MB.
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
        self.window = max(64, min(window, _BUDGET // (16 * max(count, 1))))
        self.sizes = np.asarray(sizes if sizes is not None else [1024] * count, dtype=np.float64)
        self.matrices = np.asarray(matrices if matrices is not None else [True] * count, dtype=bool)
        self.fan_in = np.asarray(fan_in if fan_in is not None else [10] * count, dtype=np.float64)
        self.order: NDArray[np.intp] = np.arange(count)[::-1].copy()
        self.facts = Facts()
        self.rows = 0
        self._task = 0  # the row at which the present task began

        self._grad = np.full((self.window, count), np.nan)
        self._weight = np.full((self.window, count), np.nan)
        self._loss = np.full(self.window, np.nan)
        self._norm = np.full(self.window, np.nan)
        self._coefficient = np.full(self.window, np.nan)
        self._skipped = np.zeros(self.window, dtype=bool)
        self._step = np.full(self.window, -1, dtype=np.int64)

        self._row = Row(-1, math.nan, np.full(count, np.nan), math.nan)
        self._row_is_last = True
        self._typical_grad = Typical(count, half_life=64)
        self._learned = self._to_learn = self._normed = 0
        self.typical_weight = Typical(count, half_life=16)
        self.weight: Floats = np.full(count, np.nan)
        self.previous_weight: Floats = np.full(count, np.nan)
        self.least_weight: Floats = np.full(count, np.nan)
        self.weight_gap = 1
        self._weight_step = 0
        self._all_finite = np.zeros(count, dtype=np.uint8)
        self.nonfinite = self._all_finite
        self.nonfinite_weight = np.zeros(count, dtype=bool)
        self.dead_share: Floats = np.full(count, np.nan)
        self.unchanged: Floats = np.full(count, np.nan)
        self.rate: Floats = np.full(count, np.nan)
        self.previous_rate: Floats = self.rate
        self._top_rate, self._rose_at = -math.inf, 0
        self._stuck_at, self._stuck = -1, False
        self.reference_loss = math.nan
        self._first_losses: list[float] = []
        self.losses = 0
        self._harder = 0.0

    # -- writing: the pipeline only

    def push(self, row: Row) -> None:
        """Keep a row. Its non-finite values are kept in the ring, and out of every reference."""
        self._add_norms()
        slot = self._put(row.step, row.loss, row.grad_norm)
        self._row, self._row_is_last, self._normed = row, True, self.rows
        self._norm[slot] = row.global_norm
        self._coefficient[slot] = row.applied
        self.nonfinite = row.nonfinite if row.nonfinite is not None else self._all_finite
        self.previous_rate = self.rate
        if row.rate is not None and row.rate is not self.rate:
            self.rate = row.rate
            with quiet_numpy():
                top = float(np.fmax.reduce(row.rate, initial=-math.inf))
            if top > 1.0001 * self._top_rate:
                self._top_rate, self._rose_at = top, self.rows
        if row.dead_share is not None:
            self.dead_share = row.dead_share
        if row.unchanged is not None:
            self.unchanged = row.unchanged
        if row.weight_norm is None:
            self._weight[slot] = np.nan
        else:
            self._push_weight(slot, row)
        if row.has_loss:
            self.losses += 1
            if len(self._first_losses) < FIRST_LOSSES and math.isfinite(row.loss):
                self._first_losses.append(row.loss)
                self.reference_loss = median(np.array(self._first_losses))

    def note(self, step: int, loss: float, grad_norm: Floats, columns: NDArray[np.intp] | None, applied: float) -> None:
        """Keep a row that nobody need judge: finite, like the one before it but for these numbers.

        ``grad_norm`` has shape (n,), its columns' numbers are ``columns``; None: all layers. ``applied`` is the factor of
        the user's clip.
        """
        if columns is not None:
            spread = np.full(len(self.layers), np.nan)
            spread[columns] = grad_norm
            grad_norm = spread
        slot = self._put(step, loss, grad_norm)
        self._row_is_last = False
        self._coefficient[slot] = applied
        self._weight[slot] = np.nan
        self.losses += self._row.has_loss
        self._to_learn = self.rows

    def _add_norms(self) -> None:
        """Compute the global norms of the noted rows, which nobody has asked for yet."""
        if self._normed < self.rows:
            slots = np.arange(self._normed, self.rows) % self.window
            self._norm[slots] = np.sqrt(np.nansum(np.square(self._grad[slots]), axis=1))
            self._normed = self.rows

    def _put(self, step: int, loss: float, grad_norm: Floats) -> int:
        slot = self.rows % self.window
        self._grad[slot] = grad_norm
        self._loss[slot] = loss
        self._skipped[slot] = False
        self._step[slot] = step
        self.rows += 1  # last: another thread may read
        return slot

    def _push_weight(self, slot: int, row: Row) -> None:
        weight = row.weight_norm
        assert weight is not None
        self._weight[slot] = weight
        self.previous_weight, self.weight = self.weight, weight
        self.least_weight = np.fmin.reduce(self.weight_norm(last=min(_RECENT, self.task_rows)), axis=0)
        self.weight_gap, self._weight_step = max(1, row.step - self._weight_step), row.step
        if row.nonfinite_weight is not None:
            self.nonfinite_weight = row.nonfinite_weight

    def grow(self, columns: Columns) -> None:
        """Take the columns of layers that were added; their past is missing."""
        self.layers = tuple(columns.names)
        count = len(self.layers)
        self.sizes = np.asarray(columns.sizes, dtype=np.float64)
        self.matrices = np.asarray(columns.matrices, dtype=bool)
        self.fan_in = np.asarray(columns.fan_in, dtype=np.float64)
        self.order = widened(self.order, count, count)
        for name in (
            "_grad",
            "_weight",
            "weight",
            "previous_weight",
            "least_weight",
            "dead_share",
            "unchanged",
            "rate",
            "previous_rate",
        ):
            setattr(self, name, widened(getattr(self, name), count, np.nan))
        self._all_finite = np.zeros(count, dtype=np.uint8)
        self.nonfinite = widened(self.nonfinite, count, 0)
        self.nonfinite_weight = widened(self.nonfinite_weight, count, 0)
        self._row = self.row._replace(grad_norm=widened(self.row.grad_norm, count, np.nan))
        self._begin_task()

    def _begin_task(self) -> None:
        """Take the coming rows for those of another task: new layers bring a loss and gradients of another size with them."""
        count = len(self.layers)
        self._task = self._learned = self._to_learn = self.rows
        self._typical_grad = Typical(count, half_life=64)
        self.typical_weight = Typical(count, half_life=16)
        self.weight, self.previous_weight, self.least_weight = np.full((3, count), np.nan)
        self.reference_loss, self._first_losses, self.losses = math.nan, [], 0
        self._harder = 0.0

    def follow_task(self) -> None:
        """The last loss is so large for its task has become harder: what comes is compared with it."""
        if math.isfinite(self.row.loss):
            self._harder = max(self._harder, abs(self.row.loss))

    def learn(self) -> None:
        """Let the run's own typical values follow the last row; called after the rules have judged it.

        Gradient norms are only noted: they are learned together when somebody asks for their typical values.
        """
        self._to_learn = self.rows
        if self.row.weight_norm is not None:
            with quiet_numpy():
                self.typical_weight.update(self.row.weight_norm)
        if self._to_learn - self._learned >= self.window // 2:
            self._catch_up()

    @property
    def typical_grad(self) -> Typical:
        """The typical gradient norm of each layer, before the row that is being judged."""
        if self._learned < self._to_learn:
            self._catch_up()
        return self._typical_grad

    def _catch_up(self) -> None:
        slots = np.arange(self._learned, self._to_learn) % self.window
        self._learned = self._to_learn
        with quiet_numpy():
            self._typical_grad.update_all(self._grad[slots])

    def amend(self, *, coefficient: float, skipped: bool = False) -> None:
        """Record on the last row what was done to its gradients."""
        slot = (self.rows - 1) % self.window
        self._coefficient[slot] *= coefficient
        self._skipped[slot] = skipped

    # -- reading

    def copied(self, first: int, until: int) -> Copied:
        """Return the rows of the numbers from ``first`` to before ``until``; the run's first row has the number 0.

        They must still be kept. Nothing is changed, so that another thread may ask.
        """
        numbers = np.arange(first, until)
        slots = numbers % self.window
        grad_norm, norm = self._grad[slots], self._norm[slots]
        missing = numbers >= self._normed
        with quiet_numpy():
            norm[missing] = np.sqrt(np.nansum(np.square(grad_norm[missing]), axis=1))
        return Copied(
            self._step[slots], self._loss[slots], norm, self._coefficient[slots], self._skipped[slots], grad_norm
        )

    @property
    def row(self) -> Row:
        """The last row."""
        if not self._row_is_last:
            self._add_norms()
            slot = (self.rows - 1) % self.window
            last = self._row
            self._row_is_last = True
            self._row = Row(
                step=int(self._step[slot]),
                loss=float(self._loss[slot]),
                grad_norm=self._grad[slot].copy(),
                global_norm=float(self._norm[slot]),
                rate=last.rate,
                family=last.family,
                applied=float(self._coefficient[slot]),
                arrived=last.arrived,
                provenance=last.provenance,
            )
        return self._row

    def _last(self, ring: NDArray[Any], last: int | None) -> NDArray[Any]:
        kept = min(self.rows, self.window)
        count = kept if last is None else min(last, kept)
        end = self.rows % self.window
        view = ring[end - count : end] if end - count >= 0 else np.concatenate([ring[end - count :], ring[:end]])
        view.flags.writeable = False
        return view

    def grad_norm(self, last: int | None = None) -> Floats:
        """Gradient norms, shape (n, L), oldest first; as measured, before any clip of auto-clip."""
        return self._last(self._grad, last)

    def weight_norm(self, last: int | None = None) -> Floats:
        """Weight norms before the step's update, shape (n, L), oldest first; NaN where none was sampled."""
        return self._last(self._weight, last)

    def loss(self, last: int | None = None) -> Floats:
        """Losses, shape (n,), oldest first; NaN where none was seen."""
        return self._last(self._loss, last)

    @property
    def task_rows(self) -> int:
        """The rows since layers were last added or replaced, which makes it another task; those since the start before that."""
        return self.rows - self._task

    def task_loss(self, last: int | None = None) -> Floats:
        """Losses of the present task, shape (n,), oldest first: a new head has nothing to do with the losses before it."""
        return self.loss(last=self.task_rows if last is None else min(last, self.task_rows))

    def global_norm(self, last: int | None = None) -> Floats:
        """L2 norms of all gradients as one vector, shape (n,), oldest first."""
        self._add_norms()
        return self._last(self._norm, last)

    def clip_coefficient(self, last: int | None = None) -> Floats:
        """Norm after clipping over norm before it, shape (n,), oldest first; 1.0 where nothing was clipped."""
        return self._last(self._coefficient, last)

    def skipped(self, last: int | None = None) -> NDArray[np.bool_]:
        """Whether auto-clip skipped the optimizer step, shape (n,), oldest first."""
        return self._last(self._skipped, last)

    def steps(self, last: int | None = None) -> NDArray[np.int64]:
        """The optimizer steps of the rows, shape (n,), oldest first."""
        return self._last(self._step, last)

    @property
    def clips_each_step(self) -> bool:
        """True where a clip is in force whatever happens: the user's own, or auto-clip that is always on."""
        return self.facts.clips_always or self.row.provenance.clipped == "before the user's clip"

    @property
    def provenance(self) -> Provenance:
        """Where the last row's numbers come from."""
        return self.row.provenance

    def surge(self) -> Floats:
        """The last gradient norms over their typical size, shape (L,); NaN in a layer's first eight steps."""
        ratio: Floats = self.row.grad_norm / self.typical_grad.value
        ratio[(self.typical_grad.seen < SETTLED) | (self.nonfinite > 0)] = np.nan
        return ratio

    def loss_level(self, window: int = 32) -> tuple[float, float]:
        """Median and scaled MAD of the losses before the last one."""
        return median_and_mad(self.task_loss(last=window + 1)[:-1])

    @property
    def loss_nonfinite(self) -> bool:
        """True when the last row has a loss and it is NaN or infinite."""
        return self.row.loss_nonfinite

    @property
    def arriving(self) -> NDArray[np.bool_]:
        """Layers that get a gradient other than zero, shape (L,)."""
        some = self.row.grad_norm > 0
        return some if self.row.arrived is None else some | (self.row.arrived & np.isnan(self.row.grad_norm))

    @property
    def promise(self) -> Floats:
        """By how much this step of SGD would lower the loss to first order, each layer's part: ``lr ||g||^2``, shape (L,).

        NaN for other optimizers, where it is not known that the gradients came from the loss seen, and where a loss below
        zero says that zero is no floor.
        """
        row = self.row
        if row.family != "sgd" or row.provenance.loss in ("none", "monitor.loss()") or not self.least_loss >= 0:
            return np.full(len(self.layers), np.nan)
        part: Floats = self.rate * np.square(row.applied * row.grad_norm)
        return part

    @property
    def least_loss(self) -> float:
        """The least of the losses kept; infinity where none was seen."""
        return float(np.fmin.reduce(self.task_loss(), initial=math.inf))

    @property
    def largest_first_loss(self) -> float:
        """The largest magnitude of the run's first 16 finite losses, and of those that a harder task has made since.

        NaN before the sixteenth.
        """
        enough = len(self._first_losses) == FIRST_LOSSES
        return max(self._harder, *map(abs, self._first_losses)) if enough else math.nan

    @property
    def stuck(self) -> bool:
        """True when at least 100 losses were seen and the last 32 lie less than a tenth below the reference loss."""
        if self._stuck_at != self.rows:
            self._stuck_at, self._stuck = self.rows, self.losses >= 100 and not self.gained(0.1, last=32)
        return self._stuck

    @property
    def warming_up(self) -> bool:
        """True when a learning rate was the highest of the run within the last 50 rows: the run has not begun in earnest."""
        return self.rows - self._rose_at < _WARM

    def gained(self, share: float, last: int = 16) -> bool:
        """True when the median of the last losses lies at least this share of the reference loss below it."""
        now, _ = median_and_mad(self.task_loss(last=last))
        return bool(self.reference_loss - now >= share * abs(self.reference_loss))

    @property
    def telling(self) -> NDArray[np.bool_]:
        """Matrices of at least 16 elements, shape (L,): a line through a few points may well move by more than itself."""
        return self.matrices & (self.sizes >= _SMALLEST)

    @property
    def half_usual(self) -> Floats:
        """Half of a matrix's norm after a usual initialisation, shape (L,): a floor for layers that start near zero."""
        return 0.5 * np.sqrt(self.sizes / self.fan_in)

    def relative_gain(self) -> Floats:
        """What each matrix multiplies by, over the median of all, shape (L,); NaN for others and with less than three.

        The gain is ``||w|| sqrt(f / n)``: near 1 for a usual initialisation, whatever the shape.
        """
        gain = self.weight * np.sqrt(self.fan_in / self.sizes)
        gain[~self.telling] = np.nan
        if np.count_nonzero(np.isfinite(gain)) < 3:
            gain[:] = np.nan
            return gain
        relative: Floats = gain / max(float(np.nanmedian(gain)), 0.5)
        return relative

    @property
    def half_won(self) -> bool:
        """True when the median of the last 32 losses lies at half of the reference loss or below."""
        now, _ = median_and_mad(self.task_loss(last=32))
        return bool(self.reference_loss > 0 and now <= self.reference_loss / 2)

    def loss_is_rising(self) -> bool:
        """True when the median of the last 4 losses lies above what the 32 before them usually stay below.

        In the first 12 steps there is no usual scatter yet: then it must have doubled since the first. Where no loss is
        seen nothing speaks for the run: True. A loss below a tenth of the reference loss is not worth the word.
        """
        if not self._first_losses:
            return True
        if self.losses < EARLY:
            return not self.row.loss <= self._first_losses[0] + abs(self._first_losses[0])
        now, _ = median_and_mad(self.task_loss(last=4))
        return not (0 <= now < self.reference_loss / 10 or min(now, self.row.loss) <= self.loss_ceiling(last=4))

    def next_loss_ceiling(self) -> float:
        """What the coming loss should stay below, as in `loss_is_rising`; minus infinity where none is seen."""
        if not self._first_losses:
            return -math.inf
        if self.losses < EARLY:
            return self._first_losses[0] + abs(self._first_losses[0])
        return self.loss_ceiling(last=0)

    def loss_ceiling(self, last: int) -> float:
        """What the 32 losses before the ``last`` ones usually stay below; NaN where there are none.

        The highest of: nine in ten of them; their median and three scaled MADs; their median and a tenth of it.
        """
        before = self.task_loss(last=32 + last)
        before = before[: len(before) - last]
        before = before[np.isfinite(before)]
        middle, scatter = median_and_mad(before)
        return (
            max(float(np.quantile(before, 0.9)), middle + max(3 * scatter, abs(middle) / 10))
            if before.size
            else math.nan
        )

    def first_nonfinite(self) -> str | None:
        """The first layer, in backward order, whose gradient holds NaN or Inf in the last row."""
        hit = np.flatnonzero(self.nonfinite != NonFinite.NONE)
        if not hit.size:
            return None
        return self.layers[int(hit[np.argmin(self.order[hit])])]

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """The run's references; plain lists and numbers. The ring itself is not part of it."""
        return {
            "layers": list(self.layers),
            "losses": self.losses,
            "first_losses": list(self._first_losses),
            "typical_grad": self.typical_grad.state_dict(),
            "typical_weight": self.typical_weight.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises `UsageError`, and takes nothing, where it is damaged or of other layers."""
        saved = read_state(state, self.layers)
        self.losses, self._first_losses = saved.losses, saved.first_losses
        self.reference_loss = median(np.array(self._first_losses))
        self.typical_grad.load_state_dict(saved.typical_grad)
        self.typical_weight.load_state_dict(saved.typical_weight)
