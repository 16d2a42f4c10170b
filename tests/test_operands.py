"""Numbers of the tensors that an operation got, and what can be known of an operation by the size of what it got."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradwatch.forensics import ops
from gradwatch.forensics.operands import is_nonfinite, operand_of, rows_of
from gradwatch.forensics.trace import Trace

NAN, INF = float("nan"), float("inf")
aten: Any = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, -2.0, 0.0, 3.0],
        [NAN, -2.0, 0.0, INF],
        [-INF, 0.0, -0.0, NAN],
        [NAN, INF, -INF, NAN],
        [65504.0, -65504.0, INF, 1.0],
        [],
    ],
)
def test_the_numbers_of_a_tensor_are_those_of_numpy(values: list[float], dtype: torch.dtype) -> None:
    """Range of the finite elements, zeros, NaN, infinities, and rows that are not finite."""
    tensor = torch.tensor(values, dtype=dtype)
    plain = tensor.double().numpy()
    finite = plain[np.isfinite(plain)]
    told = operand_of("x", tensor)
    assert (told.elements, told.zeros) == (plain.size, int((plain == 0).sum()))
    assert (told.nans, told.infs) == (int(np.isnan(plain).sum()), int(np.isinf(plain).sum()))
    expected = (finite.min(), finite.max()) if finite.size else (NAN, NAN)
    np.testing.assert_equal((told.smallest, told.largest), expected)
    assert rows_of(tensor) == tuple(np.flatnonzero(~np.isfinite(plain)))
    assert is_nonfinite(tensor) is (finite.size < plain.size)


def test_running_statistics_that_are_not_finite_are_no_input_of_a_batch_norm_that_trains() -> None:
    """It only changes them; one that does not train divides by them."""
    x, bad = torch.randn(8, 2), torch.full((2,), NAN)

    def given(*, training: bool) -> list[str]:
        args = (x, None, None, bad, bad, training, 0.1, 1e-5)
        return [name for name, _ in ops.named_inputs(aten.native_batch_norm.default, args, {})]

    assert given(training=True) == ["input"]
    assert given(training=False) == ["input", "running_mean", "running_var"]
    assert torch.nn.functional.batch_norm(x, bad.clone(), bad.clone(), training=True).isfinite().all()


@pytest.mark.parametrize(("eps", "passes"), [(1e-5, True), (0.0, False)])
def test_a_normalisation_passes_on_only_if_it_divides_by_no_zero(eps: float, passes: bool) -> None:
    """With eps 0, it makes NaN of a row of constants beside one that held NaN."""
    x = torch.tensor([[NAN, 1.0], [3.0, 3.0]])
    args = (x, (2,), None, None, eps)
    func = aten.native_layer_norm.default
    assert ops.only_passes_on(func, args, {}, [x], [x]) is passes
    assert bool(func(*args)[0][1].isfinite().all()) is passes
    assert Trace._makes(func, args, {}, [x], [x]) is not passes
