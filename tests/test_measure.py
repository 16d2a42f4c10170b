"""Norms against dumb loops, and everything that is not an ordinary number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.measure.norms import NormPlan, count_nonfinite, fingerprint, global_norm_of, live_units, norm_of

if TYPE_CHECKING:
    from collections.abc import Callable


def loop_norm(tensor: Tensor) -> float:
    """The L2 norm by a loop over Python numbers."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return math.sqrt(math.fsum(abs(value) ** 2 for value in dense.flatten().tolist()))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]),
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(0, 1000),
)
def test_norms_of_any_mixture_agree_with_a_dumb_loop(shapes: list[tuple[list[int], torch.dtype]], seed: int) -> None:
    """Any shapes, empty ones too, any dtypes, in one call, within 1e-6."""
    torch.manual_seed(seed)
    tensors = [torch.randn(shape, dtype=dtype) for shape, dtype in shapes]
    norms = NormPlan(tensors).norms(tensors)
    np.testing.assert_allclose(norms, [loop_norm(tensor) for tensor in tensors], rtol=1e-6)
    assert global_norm_of(norms) == pytest.approx(math.sqrt(sum(loop_norm(t) ** 2 for t in tensors)), rel=1e-6)


def test_an_uncoalesced_sparse_gradient_is_summed_first() -> None:
    """Rows that occur twice count once, with their sum."""
    indices = torch.tensor([[0, 2, 0]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(3, 4), (5, 4), check_invariants=True)
    assert norm_of(sparse) == pytest.approx(loop_norm(sparse.to_dense()))


def test_half_precision_norms_do_not_overflow() -> None:
    """A healthy float16 tensor whose norm exceeds 65504."""
    half = 3000 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    assert half.norm().isinf()
    assert NormPlan([half]).norms([half])[0] == pytest.approx(half.double().norm().item(), rel=1e-6)


def test_large_tensors_keep_their_digits() -> None:
    """Forty million elements within 1e-6 of float64, where one float32 sum is a thousand times worse."""
    large = torch.full((40_000_000,), 0.1)
    assert norm_of(large) == pytest.approx(math.sqrt(40_000_000) * float(np.float32(0.1)), rel=1e-6)


def _outlier(elements: int) -> Tensor:
    tensor = torch.randn(elements)
    tensor[elements // 2] = 1e4
    return tensor


KINDS: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda elements: torch.full((elements,), 0.0373),
    "normal": torch.randn,
    "one outlier": _outlier,
    "heavy tails": lambda elements: torch.randn(elements) ** 7,
    "a column of a matrix": lambda elements: torch.full((elements, 2), 0.1)[:, 0],
    "one number expanded": lambda elements: torch.full((), 0.1).expand(elements),
    "half": lambda elements: torch.full((elements,), 0.1, dtype=torch.float16),
    "bfloat16": lambda elements: torch.full((elements,), 0.1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_large_layers_are_within_1e_6_whatever_their_numbers_and_size(kind: str) -> None:
    """Powers of two, primes and their neighbours; by every way that a norm is taken on the CPU."""
    torch.manual_seed(0)
    sizes = [1 << 15, (1 << 15) + 3, 49_999, 3 << 15, (1 << 17) - 1, 1 << 20, 1_000_003]
    tensors = [KINDS[kind](elements) for elements in sizes]
    truth = [tensor.double().norm().item() for tensor in tensors]
    plan = NormPlan(tensors)
    np.testing.assert_allclose(plan.norms(tensors), truth, rtol=1e-6)
    np.testing.assert_allclose([norm_of(tensor) for tensor in tensors], truth, rtol=1e-6)
    assert plan.shareable == (kind not in ("half", "bfloat16"))
    if plan.shareable:
        norms, total = plan.shared(tensors)
        np.testing.assert_allclose(norms, truth, rtol=1e-6)
        assert total.item() == torch.nn.utils.get_total_norm(tensors).item()


@pytest.mark.parametrize("constant", [0.1, 0.0373, 1.7, 3e-5, 123.4])
def test_a_layer_of_a_thousand_equal_elements_is_within_1e_6(constant: float) -> None:
    """Torch's own sum is good enough up to there, also where elements do not lie side by side."""
    for tensor in (torch.full((1000,), constant), torch.full((1000, 3), constant)[:, 1]):
        assert NormPlan([tensor]).norms([tensor])[0] == pytest.approx(tensor.double().norm().item(), rel=1e-6)


def test_nan_inf_and_overflow_are_told_apart() -> None:
    """Counts of NaN and Inf; finite values whose float32 norm overflows get their true norm."""
    assert count_nonfinite(torch.tensor([1.0, math.nan, math.inf, -math.inf]))[:2] == (1, 2)
    nans, infs, norm = count_nonfinite(torch.tensor([3e30, 4e30]))
    assert (nans, infs) == (0, 0)
    assert norm == pytest.approx(5e30, rel=1e-6)
    assert count_nonfinite(torch.tensor([3e-30, 4e-30]))[2] == pytest.approx(5e-30, rel=1e-6)


def test_nan_and_inf_propagate_to_the_global_norm() -> None:
    """Finding them costs nothing because nothing hides them."""
    assert math.isnan(global_norm_of(np.array([3.0, math.nan, 4.0])))
    assert math.isinf(global_norm_of(np.array([3.0, math.inf])))
    assert global_norm_of(np.array([3.0, 4.0])) == 5.0


def test_live_units_are_rows_with_any_gradient() -> None:
    """Even one so small that its square is zero."""
    gradient = torch.zeros(3, 4)
    gradient[0, 1] = 1.0
    gradient[2, 3] = 1e-30
    assert live_units(gradient).tolist() == [True, False, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_units_are_counted_and_weights_compared_without_a_copy(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """No operation gives as many elements as the tensor has, views aside; the answers are those of a dumb loop."""
    tensor = torch.randn(8, 64, 40, 40).to(dtype).to(memory_format=layout)
    tensor[3] = 0
    tensor[5] = 0
    tensor[5, 1, 2, 3] = math.nan

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, (list, tuple)) else (result,):
                if one._base is None and one.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    self.elements = max(self.elements, one.numel())
            return result

    with Largest() as made:  # type: ignore[no-untyped-call]
        live, print_ = live_units(tensor), fingerprint(tensor)
    assert live.tolist() == [bool(part.abs().sum()) for part in tensor.flatten(1)]
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = numbers.contiguous().view(torch.int16 if dtype is torch.float16 else torch.int32)
    assert print_.item() == int(bits.to(torch.int64).sum())
    assert 0 < made.elements <= 64
    with Largest() as made:  # type: ignore[no-untyped-call]
        tensor.abs()
    assert made.elements == tensor.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_fingerprint_changes_with_any_bit(dtype: torch.dtype) -> None:
    """The smallest possible change of one element is seen."""
    tensor = torch.randn(50, dtype=dtype)
    before = fingerprint(tensor).item()
    assert fingerprint(tensor.clone()).item() == before
    tensor.view(torch.uint8)[7] ^= 1
    assert fingerprint(tensor).item() != before


def test_a_batch_without_any_gradient_says_nothing_of_single_units() -> None:
    """As of a policy whose reward is rare: no unit is dead because there was none at the samples, and dead ones stay known."""
    torch.manual_seed(0)
    first = nn.Linear(4, 8)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        first.bias[:6] = -100.0  # six of eight units never act
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    shares = {}
    for rewarded in (1, 2, 30):
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for step in range(130):
                optimizer.zero_grad()
                (model(torch.randn(16, 4)).pow(2).mean() * (step % rewarded == 0)).backward()
                optimizer.step()
            shares[rewarded] = monitor.history.dead_share[0]
    assert shares == pytest.approx({1: 0.75, 2: 0.75, 30: math.nan}, nan_ok=True)
