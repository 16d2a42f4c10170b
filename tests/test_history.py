"""The ring: order, bounds, read-only views, references."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.errors import UsageError
from gradwatch.history.history import History
from gradwatch.records import Provenance, Row


def row(step: int, grad: list[float], loss: float = 1.0, weight: list[float] | None = None) -> Row:
    """Return a written row."""
    norms = np.array(grad)
    return Row(
        step,
        loss,
        norms,
        float(np.linalg.norm(norms)),
        weight_norm=None if weight is None else np.array(weight),
        provenance=Provenance(source="written", loss="written"),
    )


def test_rows_come_back_oldest_first_with_their_shapes() -> None:
    """`grad_norm(last=n)` is (n, L); loss and global norm are (n,)."""
    history = History(["a", "b"])
    for step in range(5):
        history.push(row(step, [step, 2.0 * step], loss=10.0 * step))
    np.testing.assert_array_equal(history.grad_norm(last=3), [[2, 4], [3, 6], [4, 8]])
    np.testing.assert_array_equal(history.loss(last=2), [30, 40])
    assert history.grad_norm().shape == (5, 2)
    assert history.global_norm(last=100).shape == (5,)


def test_the_ring_forgets_the_oldest_rows_only() -> None:
    """After 100 rows in a ring of 64 the last 64 are there, in order, across the seam."""
    history = History(["a"], window=64)
    for step in range(100):
        history.push(row(step, [float(step)]))
    np.testing.assert_array_equal(history.grad_norm()[:, 0], np.arange(36, 100))
    np.testing.assert_array_equal(history.steps(last=5), np.arange(95, 100))


def test_views_are_read_only() -> None:
    """A rule cannot change what it reads."""
    history = History(["a"])
    history.push(row(0, [1.0]))
    with pytest.raises(ValueError, match="read-only"):
        history.grad_norm()[0, 0] = 2.0


def test_a_wide_model_gets_a_shorter_ring() -> None:
    """The ring stays within 16 MB of norms, and 300 layers keep 1,024 rows."""
    assert History([f"l{i}" for i in range(300)]).window == 1024
    wide = History([f"l{i}" for i in range(10_000)])
    assert wide.window * 10_000 * 16 <= 17 * 2**20


def test_weights_that_were_not_sampled_are_nan() -> None:
    """Missing is NaN in the ring, while the last sample stays at hand."""
    history = History(["a"])
    history.push(row(0, [1.0], weight=[3.0]))
    history.push(row(1, [1.0]))
    assert math.isnan(history.weight_norm(last=1)[0, 0])
    assert history.weight[0] == 3.0


def test_what_was_done_to_the_gradients_is_recorded_on_the_last_row() -> None:
    """`amend` multiplies the coefficient and marks a skip."""
    history = History(["a"])
    history.push(row(0, [1.0]))
    history.push(row(1, [1.0]))
    history.amend(coefficient=0.25, skipped=True)
    assert history.clip_coefficient().tolist() == [1.0, 0.25]
    assert history.skipped().tolist() == [False, True]


def test_a_rising_loss_is_told_from_a_falling_and_a_noisy_one() -> None:
    """Rising means above the usual scatter, for several steps."""
    noise = np.random.default_rng(0).normal(0, 0.1, 60)
    for losses, rising in (
        (1 + noise, False),
        (3 - 0.04 * np.arange(60) + noise, False),
        (np.concatenate([1 + noise[:56], [4, 5, 6, 7]]), True),
        (np.concatenate([0.001 + 1e-5 * noise[:56], [0.01] * 4]), True),
    ):
        history = History(["a"])
        for step, loss in enumerate(losses):
            history.push(row(step, [1.0], loss=float(loss)))
        assert history.loss_is_rising() is rising


def test_references_survive_a_resume_and_refuse_another_model() -> None:
    """`state_dict` holds the baselines; another model's are refused with both sizes."""
    one = History(["a"])
    for step in range(20):
        one.push(row(step, [2.0], loss=5.0, weight=[1.0]))
        one.learn()
    other = History(["a"])
    other.load_state_dict(one.state_dict())
    assert other.reference_loss == 5.0
    assert other.typical_grad.value[0] == pytest.approx(2.0)
    with pytest.raises(UsageError, match="1 saved, 2 watched"):
        History(["a", "b"]).load_state_dict(one.state_dict())


def test_the_longest_absence_of_a_gradient_is_that_of_a_loop() -> None:
    """Also of absences that began in rows which are no longer kept, with norms processed in batches of any length."""
    random = np.random.default_rng(0)
    came = random.random((500, 3)) < (0.02, 0.3, 0.95)
    history = History(["a", "b", "c"], window=64)
    run, longest = np.zeros(3), np.zeros(3)
    for step, here in enumerate(came):
        history.push(Row(step, 1.0, np.where(here, 1.0, np.nan), 1.0))
        history.learn()
        longest = np.where(here, np.maximum(longest, run), longest)
        run = np.where(here, 0, run + 1)
        if random.random() < 0.1:
            assert history.longest_absence.tolist() == longest.tolist()
    assert history.longest_absence.tolist() == longest.tolist()
