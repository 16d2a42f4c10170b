"""Clips against torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.clips import CLIPS, Clip
from gradwatch.measure import NormPlan, global_norm_of


def gradients(seed: int, scale: float = 3.0) -> list[Tensor]:
    """Return gradients of several shapes."""
    torch.manual_seed(seed)
    return [scale * torch.randn(shape) for shape in ((4, 5), (7,), (2, 3, 4))]


def as_parameters(tensors: list[Tensor]) -> list[nn.Parameter]:
    """Return parameters with these gradients."""
    parameters = []
    for tensor in tensors:
        parameter = nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor.clone()
        parameters.append(parameter)
    return parameters


def norm(tensors: list[Tensor]) -> float:
    """Return their global norm as gradwatch measures it."""
    return global_norm_of(NormPlan(tensors).norms(tensors))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 7.0, 1000.0])
def test_clip_norm_equals_torchs(max_norm: float) -> None:
    """Same gradients within 1e-6, above and below the bound."""
    mine, theirs = gradients(0), as_parameters(gradients(0))
    coefficient = gradwatch.ClipNorm(max_norm).apply(mine, norm(mine))
    total = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert coefficient == pytest.approx(min(1.0, max_norm / (total.item() + 1e-6)), rel=1e-6)
    for one, other in zip(mine, theirs, strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one, other.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_value", [0.1, 0.5, 100.0])
def test_clip_value_equals_torchs(max_value: float) -> None:
    """Same gradients exactly, and the coefficient is norm after over norm before."""
    mine, theirs = gradients(1), as_parameters(gradients(1))
    before = norm(mine)
    coefficient = gradwatch.ClipValue(max_value).apply(mine, before)
    nn.utils.clip_grad_value_(theirs, max_value)
    for one, other in zip(mine, theirs, strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one, other.grad, rtol=0, atol=0)
    assert coefficient == pytest.approx(norm(mine) / before)


@pytest.mark.parametrize("clip", [gradwatch.ClipNorm(0.5), gradwatch.ClipValue(0.5)])
def test_sparse_and_complex_gradients_are_clipped_too(clip: Clip) -> None:
    """A sparse gradient ends as its dense twin would; complex parts are limited."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.full((3, 4), 5.0), (5, 4), check_invariants=True)
    dense = sparse.to_dense()
    clip.apply([sparse], norm([sparse]))
    clip.apply([dense], norm([dense]))
    torch.testing.assert_close(sparse.to_dense(), dense)
    wave = torch.tensor([3 + 4j, 0.1j])
    clip.apply([wave], norm([wave]))
    assert torch.view_as_real(wave).abs().max() <= 0.5


def test_huge_finite_gradients_keep_their_direction() -> None:
    """Where torch's own norm overflows and zeroes everything, the direction stays."""
    huge = [torch.tensor([3e25, 4e25])]
    from gradwatch.measure import look_closer

    gradwatch.ClipNorm(1.0).apply(huge, look_closer(huge[0])[2])
    torch.testing.assert_close(huge[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("name", CLIPS)
def test_a_loosened_clip_is_wider_by_the_factor(name: str) -> None:
    """Every bound is multiplied; the original stays."""
    clip = CLIPS[name]()
    for before, after in zip(clip.model_dump().values(), clip.loosened(3.0).model_dump().values(), strict=True):
        assert after == pytest.approx(3 * before)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, "wide"])
@pytest.mark.parametrize("clip", [gradwatch.ClipNorm, gradwatch.ClipValue])
def test_a_bound_that_makes_no_sense_is_refused_with_its_value(clip: type[Clip], bad: object) -> None:
    """Zero, negative, NaN, infinite, not a number."""
    with pytest.raises(gradwatch.UsageError, match=rf"{clip.__name__}\(max_.*={bad!r}\)"):
        clip(bad)  # type: ignore[call-arg]
