"""The real thing, where a CUDA device is present: no synchronisation, the CPU's numbers, and what a step costs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.trainings import data, mlp, true_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Every wait for the device raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Train without a read."""
    x, y = (part.cuda() for part in data())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_no_step_waits_for_the_device(clip: str | None, fused: bool) -> None:
    """A hundred steps under `set_sync_debug_mode("error")`, whatever is armed."""
    model = mlp().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    monitor = gradwatch.attach(model, clip=clip, report=None, strict=True)
    steps(model, optimizer, 100)
    monitor.detach()
    assert monitor.history.rows == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_are_those_of_a_loop_on_the_host(dtype: torch.dtype) -> None:
    """Within 1e-6, near 1e20 too where the dtype reaches so far."""
    model = mlp().cuda().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-25)
    x, y = (part.cuda().to(dtype) for part in data())
    truth = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) * (1.0 if dtype is torch.float16 else 1e20)
            loss.backward()
            truth.append([true_norm(parameter.grad.cpu()) for parameter in model.parameters()])  # type: ignore[union-attr]
            optimizer.step()
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)


def test_a_model_on_two_devices_is_measured_as_one() -> None:
    """Its first half on the CPU, its second on CUDA."""
    model = mlp()
    model[2:].cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    truth = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(model[2:](model[:2](x).cuda()), y.cuda()).backward()
            truth.append([true_norm(parameter.grad.cpu()) for parameter in model.parameters()])  # type: ignore[union-attr]
            optimizer.step()
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_numbers_come_without_the_scale(fused: bool) -> None:
    """Left-out steps leave no row; the others the norms of the unscaled loss."""
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**126)
    x, y = (part.cuda() for part in data())
    truth: list[list[float]] = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            norms = [true_norm(parameter.grad.cpu()) / scale for parameter in model.parameters()]  # type: ignore[union-attr]
            if all(math.isfinite(norm) for norm in norms):
                truth.append(norms)
            scaler.step(optimizer)
            scaler.update()
    assert truth
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_poisoned_step_and_a_surge_do_no_harm(fused: bool) -> None:
    """Decided on the device: NaN never reaches the weights, a surge is clipped in its own step."""
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    x, y = (part.cuda() for part in data())
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(40):
            factor = {20: math.nan, 30: 1e4}.get(step, 1.0)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y * factor).backward()
            optimizer.step()
    assert np.flatnonzero(monitor.history.skipped()).tolist() == [20] * fused  # others get zeros there
    assert monitor.history.clip_coefficient()[30] < 1e-2
    assert monitor.history.loss(last=1)[0] < 2


def test_what_a_step_costs_is_recorded(record_property: Any) -> None:
    """The ratio of step times with and without, 24 layers of width 512; recorded, not asserted."""

    def seconds(watched: bool) -> float:
        model = mlp(depth=24, width=512).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        monitor = gradwatch.attach(model, clip="norm", report=None) if watched else None
        steps(model, optimizer, 50)
        torch.cuda.synchronize()
        started = time.perf_counter()
        steps(model, optimizer, 200)
        torch.cuda.synchronize()
        spent = time.perf_counter() - started
        if monitor is not None:
            monitor.detach()
        return spent

    pairs: list[tuple[float, float]] = [(seconds(watched=True), seconds(watched=False)) for _ in range(5)]
    record_property("step time, watched over plain", float(np.median([with_ / without for with_, without in pairs])))


def test_the_tests_tensors_are_on_the_device() -> None:
    """The proof is about CUDA."""
    where: Tensor = next(mlp().cuda().parameters())
    assert where.is_cuda
