"""Gradients on a device: nothing is read, decisions fall there, and rows come over in order."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch import device
from gradwatch.autoclip.decision import DevicePlan
from gradwatch.measure.readback import ReadbackRing
from gradwatch.probe.gradients import zero_where
from gradwatch.probe.surge import SquaredLimits, surges
from tests.trainings import data, mlp, step_in_backward, train

CLIPS = [None, *(clip() for clip in gradwatch.clips.CLIPS.values())]


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that must be waited for."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)


def watch(model: nn.Module, **settings: Any) -> gradwatch.Monitor:
    """Attach silently and strictly."""
    return gradwatch.attach(model, report=None, strict=True, **settings)


class Reads(TorchDispatchMode):
    """Counts the operations that bring a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("when", ["armed", "always"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_the_hot_path_runs_where_every_read_raises(clip: gradwatch.Clip | None, when: str) -> None:
    """On meta tensors there is no value to be had: measuring, deciding, clipping and sampling never ask for one."""
    model = mlp().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    policy = None if clip is None else gradwatch.AutoClip(clip, **({"when": "always"} if when == "always" else {}))
    x, y = (part.to("meta") for part in data())
    with watch(model, clip=policy) as monitor:
        for _ in range(46):  # the last of the first unit checks is among them
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert monitor._probe.recorder._device._rows is not None
        assert monitor.incidents == []
    assert monitor.history.rows == 0  # numbers that do not exist cannot come over, and zeros are never reported
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()  # the proof can fail


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_no_step_reads_a_value(clip: gradwatch.Clip | None, fused: bool) -> None:
    """Not one scalar of 100 steps comes to the host by a read, whatever is armed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    x, y = data()
    with watch(model, clip=clip) as monitor, Reads() as reads:
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        assert reads.count == 0
        loss = nn.functional.mse_loss(model(x), y)
        loss.item()
        assert reads.count == 1  # the count can fail
    assert monitor.history.rows == 100


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_watching_changes_nothing_and_clipping_matches_torch(name: str) -> None:
    """Fused optimizers take the factor without an extra pass: the same parameters as after `clip_grad_norm_`."""

    def run(how: str, fused: bool) -> list[Tensor]:
        model = mlp()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, fused=fused)
        policy = gradwatch.AutoClip(gradwatch.ClipNorm(0.05), when="always") if how == "auto" else None
        monitor = watch(model, clip=policy) if how != "torch" else None

        def clip(_: int) -> None:
            if how == "torch":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        train(model, optimizer, 20, each=clip if how != "watched" else None)
        if monitor is not None:
            monitor.detach()
            assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
            if how == "auto":
                norms = monitor.history.global_norm()
                np.testing.assert_allclose(
                    monitor.history.clip_coefficient(), np.minimum(1, 0.05 / (norms + 1e-6)), rtol=1e-6
                )
        return [parameter.detach() for parameter in model.parameters()]

    for fused in (False, True):
        for ours, torchs in zip(run("auto", fused), run("torch", fused), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_fused_optimizer_skips_a_poisoned_step_for_real(name: str) -> None:
    """Parameters and state stay as they were, to the bit; the row says so when it has come over."""
    model = mlp()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, fused=True)
    x, y = data()
    with watch(model, clip="norm") as monitor:
        for step in range(12):
            before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * (math.nan if step == 6 else 1)), y).backward()
            optimizer.step()
            if step == 6:
                torch.testing.assert_close(
                    [model.state_dict(), optimizer.state_dict()["state"]], before, rtol=0, atol=0
                )
        assert [i.opened_step for i in monitor.incidents if i.kind == "nonfinite"] == [6]
    assert np.flatnonzero(monitor.history.skipped()).tolist() == [6]
    assert monitor.notes == []


@pytest.mark.usefixtures("as_on_a_device")
def test_other_optimizers_get_zeros_and_the_monitor_says_so() -> None:
    """No NaN reaches the weights; momentum and decay still act, so that no step is called skipped, and that is told."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = data()
    with watch(model, clip="norm") as monitor:
        for step in range(12):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * (math.nan if step == 6 else 1)), y).backward()
            optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "set to zero, and no step is counted as skipped" in monitor.notes[0]
    assert not monitor.history.skipped().any()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_surge_is_clipped_in_the_very_step(clip: str, fused: bool) -> None:
    """Before any rule has seen it: the device decides by its own typical norm."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    x, y = data()
    with watch(model, clip=clip) as monitor:
        for step in range(40):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y * (1e4 if step == 30 else 1)).backward()
            optimizer.step()
    coefficients = monitor.history.clip_coefficient()
    assert coefficients[30] < 1e-2
    assert (coefficients[:30] == 1).all()
    assert monitor.history.loss(last=1)[0] < 2


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_an_exploding_run_is_saved_as_on_the_cpu(clip: str, fused: bool) -> None:
    """A rate sixty times too high from step 60 on: NaN unwatched, finite with auto-clip."""

    def run(armed: bool) -> tuple[float, list[gradwatch.Incident]]:
        model = mlp(depth=5, width=32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, fused=fused)
        monitor = watch(model, clip=clip if armed else None)

        def rate(step: int) -> None:
            optimizer.param_groups[0]["lr"] = 0.02 * (60 if step >= 60 else 1)

        x, y = data()
        losses = train(model, optimizer, 120, each=rate, x_y=(x, 10 * y))
        monitor.detach()
        return losses[-1], monitor.incidents

    assert not math.isfinite(run(armed=False)[0])
    loss, incidents = run(armed=True)
    assert math.isfinite(loss)
    assert incidents[0].opened_step >= 60


@pytest.mark.usefixtures("as_on_a_device")
def test_incidents_carry_the_true_step_although_rows_are_read_later() -> None:
    """The row of step 9 is read at step 10, and says 9."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    x, y = data()
    with watch(model) as monitor:
        for step in range(12):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y * (math.nan if step == 9 else 1)).backward()
            optimizer.step()
            assert monitor.history.rows == step
        assert monitor.incidents[0].opened_step == 9


def test_a_ring_reads_in_order_and_never_holds_more_than_its_lag() -> None:
    """With a lag of 3, the row sent 3 steps ago is the newest that is read; at the end all are."""
    ring = ReadbackRing(2, 1, torch.device("cpu"), lag=3)
    read = []
    for step in range(100):
        ring.next().singles[0] = step
        ring.send(step)
        read.append([facts for facts, table in ring.arrived() if table.singles[0] == facts])
    assert read[:3] == [[], [], [0]]
    assert read[99] == [97]
    assert [facts for facts, _ in ring.arrived(wait=True)] == [98, 99]


@pytest.mark.parametrize(
    ("norms", "loss", "expected"),
    [
        ([5.0, 1.0, 1.0], 9.0, False),
        ([20.0, 1.0, 1.0], 0.5, False),
        ([20.0, 1.0, 1.0], 9.0, True),
        ([20.0, 1.0, 1.0], math.nan, True),
        ([200.0, 1.0, 1.0], 0.5, True),
        ([200.0, 200.0, 200.0], 0.5, False),
        ([200.0, 200.0, 200.0], 0.9, True),
        ([math.nan, 1.0, 1.0], 0.5, False),
    ],
)
def test_a_step_surges_far_out_or_beside_a_loss_that_suffers(norms: list[float], loss: float, expected: bool) -> None:
    """Ten times the usual norm is learning that begins, unless the loss is up; a hundred times is not, except in all layers."""
    plan = DevicePlan(
        surge=10, far=100, loss_ceiling=1.0, loss_level=0.8, usual=np.ones(3), judged=3, least_weight=np.full(3, np.inf)
    )
    limits = SquaredLimits(torch.device("cpu")).of(plan, None)
    assert limits is not None
    assert bool(surges(torch.tensor(norms) ** 2, limits, torch.tensor(loss), plan)) is expected
    alone = surges(torch.tensor(norms) ** 2, limits, torch.tensor(loss), replace(plan, outliers_alone=True))
    assert bool(alone) is (expected and not loss > plan.loss_ceiling), (
        "under Adam, an explosion that raised the loss is left"
    )
    infinite = torch.full((3,), math.inf)  # Adam would keep it
    assert bool(surges(infinite, limits, torch.tensor(2.0), replace(plan, outliers_alone=True)))
    unknown = replace(plan, usual=np.full(3, math.nan))
    assert SquaredLimits(torch.device("cpu")).of(unknown, None) is None
    limits = SquaredLimits(torch.device("cpu")).of(replace(plan, usual=np.array([1.0, math.nan, 1.0])), None)
    assert limits is not None
    assert limits[:, 1].isinf().all()


@pytest.mark.parametrize(("rate", "weight", "expected"), [(0.1, 1.0, True), (0.1, 4.0, False), (0.01, 1.0, False)])
def test_an_update_is_too_large_for_the_weights_of_its_own_step(rate: float, weight: float, expected: bool) -> None:
    """Weights that nearly vanish, biases and layers whose rate is not known do not count; a loss that is fine excuses."""
    plan = DevicePlan(
        update=1.0,
        loss_jump=1.0,
        usual=np.full(4, math.nan),
        least_weight=np.array([0.5, 1e3, np.inf, 0.5]),
    )
    squares = torch.tensor([20.0, 20.0, 20.0, 20.0]) ** 2
    limits = SquaredLimits(torch.device("cpu"))
    assert limits.of(plan, np.full(4, rate)) is None  # no weights are known yet
    limits.take_weights(torch.tensor([weight, 0.0, 0.0, 0.0], dtype=torch.float64) ** 2)
    known = limits.of(plan, np.array([rate, rate, rate, math.nan]))
    assert known is not None
    assert bool(surges(squares, known, torch.tensor(2.0), plan)) is expected
    assert not surges(squares, known, torch.tensor(0.9), plan)
    assert bool(surges(squares, known, torch.tensor(0.9), plan, early=True)) is expected
    untold = limits.of(plan, None)  # an optimizer whose updates its gradients do not tell
    assert untold is not None
    assert not surges(squares, untold, torch.tensor(2.0), plan)


@pytest.mark.usefixtures("as_on_a_device")
def test_layers_that_are_added_are_watched_while_a_clip_is_in_reserve() -> None:
    """What is usual is not known of them yet, and the others keep theirs."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    with watch(model, clip="norm") as monitor:
        train(model, optimizer, 70, x_y=(x, y))
        model.append(nn.Linear(1, 1))
        optimizer.add_param_group({"params": list(model[-1].parameters())})
        train(model, optimizer, 10, x_y=(x, y))
        assert monitor.history.layers[-1] == "5.bias"
        assert (monitor.history.grad_norm(last=5) > 0).all()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fused", [False, True])
def test_huge_finite_gradients_keep_their_direction(fused: bool) -> None:
    """Near 1e20, where torch's own clip zeroes everything, the update has the gradient's direction and length 1."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    x, y = data()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with watch(model, clip=gradwatch.AutoClip(gradwatch.ClipNorm(1.0), when="always")):
        (1e20 * nn.functional.mse_loss(model(x), y)).backward()
        truth = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    moved = torch.cat([(b - p.detach()).double().flatten() for b, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved, truth / truth.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_stop_that_is_read_at_the_end_leaves_nothing_attached() -> None:
    """`detach` and the properties do not raise it; it is for the next step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    x, y = data()
    monitor = watch(model, clip=gradwatch.AutoClip("norm", on_nonfinite="stop"))

    def step(factor: float) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x * factor), y).backward()
        optimizer.step()

    step(1.0)
    step(math.nan)
    assert monitor.incidents[0].kind == "nonfinite"
    with pytest.raises(gradwatch.TrainingUnstableError):
        step(1.0)
    step(math.nan)
    monitor.detach()  # the fixture of all tests looks for what is left


@pytest.mark.usefixtures("as_on_a_device")
def test_two_optimizers_have_a_typical_norm_each() -> None:
    """A small one and a large one, after one clip of the user's over both: rows of their own layers, no false clip."""
    x, y = data()
    model = mlp()
    body, head = list(model.parameters())[:4], list(model.parameters())[4:]
    one, other = torch.optim.SGD(body, lr=0.001), torch.optim.SGD(head, lr=0.001)
    with watch(model, clip="norm") as monitor:
        for _ in range(40):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for parameter in body:
                    parameter.grad.mul_(1e-3)  # type: ignore[union-attr]
            truth = [[p.grad.norm().item() for p in part] for part in (body, head)]  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            one.step()
            other.step()
    np.testing.assert_allclose(monitor.history.grad_norm(last=2)[0], [*truth[0], math.nan, math.nan], rtol=1e-5)
    np.testing.assert_allclose(monitor.history.grad_norm(last=2)[1], [*[math.nan] * 4, *truth[1]], rtol=1e-5)
    assert (monitor.history.clip_coefficient() == 1).all()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_what_a_gradient_scaler_tells_its_optimizer_is_given_back_as_it_was(clip: str, unscales: bool) -> None:
    """Absent, None or a tensor, at each step: the scaler deletes what it has set, and the training is torch's own."""

    def run(clip: str | None) -> list[Tensor]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        seen: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(dict(vars(optimizer))))
        x, y = data()
        with watch(model, clip=clip):
            for _ in range(6):
                optimizer.zero_grad()
                scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
                if unscales:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
                assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            assert vars(optimizer)["grad_scale"] is None
            assert "found_inf" not in vars(optimizer)
        return [parameter.detach() for parameter in model.parameters()]

    torch.testing.assert_close(run(clip), run(None), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_the_default_device_is_nothing_to_the_monitor(clip: gradwatch.Clip | None) -> None:
    """Under `torch.set_default_device` its own tensors lie where the model's do, and memory of the host on the host."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    policy = None if clip is None else gradwatch.AutoClip(clip, when="always")
    with torch.device("meta"), watch(model, clip=policy) as monitor:
        for _ in range(70):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        assert (monitor.history.loss() > 0).all()
    assert monitor.history.rows == 70


@pytest.mark.parametrize("bad", [True, False])
def test_gradients_of_a_step_that_is_left_out_are_zero_in_every_layout(bad: bool) -> None:
    """NaN and Inf as well; those of other steps are unchanged."""
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
    gradients = [torch.randn(3, 4).to(dtype) for dtype in dtypes]
    gradients += [
        torch.randn(4, 3).t(),
        torch.randn(6, 4)[::2],
        torch.randn(3, 4).expand(2, 3, 4).clone(),
        torch.randn(1)[0],
    ]
    gradients += [torch.randn(3, 4, dtype=torch.complex64).conj(), torch.randn(3, 4).to_sparse(), torch.zeros(0, 4)]
    for gradient in gradients[:9]:
        gradient[..., 0, 0], gradient[..., 1, 0] = math.nan, -math.inf
    before = [gradient.to_dense().clone().resolve_conj() for gradient in gradients]
    zero_where(gradients, torch.tensor(bad))
    for gradient, was in zip(gradients, before, strict=True):
        expected = torch.zeros_like(was) if bad else was
        torch.testing.assert_close(gradient.to_dense().resolve_conj(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("double", "expected"), [(True, torch.float64), (False, torch.float32)])
def test_sums_are_as_wide_as_the_device_allows(
    monkeypatch: pytest.MonkeyPatch, double: bool, expected: torch.dtype
) -> None:
    """Some Intel GPUs have no float64, and say so; Metal has none."""
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=double))
    assert device.widest_float.__wrapped__(torch.device("xpu:0")) is expected
    assert device.widest_float(torch.device("mps")) is torch.float32
    assert device.widest_float(torch.device("cuda:1")) is torch.float64


def test_a_device_whose_numbers_cannot_be_read_later_is_refused() -> None:
    """At attach, by name: one that has no events cannot say when a copy has arrived."""
    model = nn.Linear(2, 2, device="meta")
    with FakeTensorMode():  # a tensor anywhere
        model.weight = nn.Parameter(torch.empty(2, 2, device="xla"))
    with pytest.raises(
        gradwatch.UsageError, match=r"This Linear cannot be watched: its parameters lie on xla, .*no events"
    ):
        watch(model)
    for known in ("cpu", "meta", "cuda", "mps", "xpu"):
        assert device.unreadable(torch.device(known)) is None


def test_towards_the_cpu_a_number_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And towards every device but CUDA, which alone takes memory of the host before the call returns."""
    asked: list[bool] = []
    tensor = torch.ones(2)
    monkeypatch.setattr(Tensor, "to", lambda *_, non_blocking: asked.append(non_blocking))
    for home in ("cpu", "cuda", "mps", "xpu"):
        device.moved(tensor, torch.device(home))
    assert asked == [False, True, False, False]


@pytest.mark.usefixtures("as_on_a_device")
def test_nothing_is_done_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row, no operation, no question to the device in hooks and patches; it is said once, and steps after it are watched."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    x, y = data()

    def steps(count: int) -> int:
        with Operations() as operations:
            for _ in range(count):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return int(operations.count)

    plain = steps(3)
    with watch(model, clip="norm") as monitor:
        assert steps(3) > plain  # the count can fail
        monkeypatch.setattr(device, "capturing", lambda: True)
        assert steps(3) == plain
        monkeypatch.setattr(device, "capturing", lambda: False)
        steps(3)
    assert monitor.history.rows == 6
    assert [note for note in monitor.notes if "CUDA graph" in note] == monitor.notes


@pytest.mark.usefixtures("as_on_a_device")
def test_an_optimizer_inside_backward_is_not_read_either() -> None:
    """Its many small steps become one row on the device."""
    model = mlp()
    step_in_backward(model)
    x, y = data()
    with watch(model) as monitor, Reads() as reads:
        for _ in range(10):
            nn.functional.mse_loss(model(x), y).backward()
        assert reads.count == 0
    assert monitor.history.rows == 10
    assert (monitor.history.grad_norm() > 0).all()


def test_a_model_that_moves_to_a_device_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows before and after it, in one history."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        train(model, optimizer, 40)
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
        train(model, optimizer, 40)
    assert monitor.history.steps().tolist() == list(range(80))
    assert (monitor.history.grad_norm() > 0).all()


@pytest.mark.usefixtures("as_on_a_device")
def test_a_clip_that_knows_no_device_says_so() -> None:
    """One of the user's own: watched on, not switched off."""

    class Half(gradwatch.Clip):
        """Halves."""

        def apply(self, step: gradwatch.clips.Step) -> float:
            """See `gradwatch.Clip`."""
            return 1.0

        def loosened(self, factor: float) -> Any:
            """See `gradwatch.Clip`."""
            return self

    model = mlp()
    with watch(model, clip=gradwatch.AutoClip(Half(), when="always")) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01, fused=True), 5)
    assert monitor.history.rows == 5
    assert "does not act on a device" in monitor.notes[0]


@pytest.mark.usefixtures("as_on_a_device")
def test_a_fused_scaler_that_never_recovers_is_an_incident() -> None:
    """Left-out steps leave no rows, until there are ten in a row."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model) as monitor:
        for step in range(40):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x * (math.nan if step >= 20 else 1)), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [incident.kind for incident in monitor.incidents if incident.severity == "critical"] == ["nonfinite"]
    assert monitor.history.provenance.source == "left out by the scaler"


@pytest.mark.usefixtures("as_on_a_device")
def test_two_optimizers_with_heads_that_take_turns_keep_their_numbers() -> None:
    """What the user's clip saw is matched to the layers of each step, whichever had a gradient."""
    trunk, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
    model = nn.ModuleList([heads, trunk])
    one, other = torch.optim.SGD(trunk.parameters(), lr=0.01), torch.optim.SGD(heads.parameters(), lr=0.01)
    x, y = data()
    truth = []
    with watch(model) as monitor:
        for step in range(6):
            model.zero_grad()
            head = heads[0](torch.tanh(trunk(x))) if step % 3 else sum(h(torch.tanh(trunk(x))) for h in heads)
            nn.functional.mse_loss(head, y).backward()
            truth.append([parameter.grad.norm().item() for parameter in trunk.parameters()])  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            one.step()
            other.step()
    np.testing.assert_allclose(monitor.history.grad_norm()[::2, 4:], truth, rtol=1e-5)


@pytest.mark.usefixtures("as_on_a_device")
def test_nan_inside_a_fused_backward_never_stops_the_run() -> None:
    """Auto-clip only watches there: no step was skipped, so none counts against the cap."""
    model = mlp()
    step_in_backward(model)
    x, y = data()
    with watch(model, clip=gradwatch.AutoClip("norm", max_skips=2)) as monitor:
        for _ in range(8):
            nn.functional.mse_loss(model(x), y * math.nan).backward()
    assert monitor.history.rows == 8
    assert not monitor.history.skipped().any()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fused", [False, True])
def test_a_lowered_rate_and_left_out_surges_reach_the_device_too(fused: bool) -> None:
    """Where the loss stays up, surges are left out, then the optimizer steps at half its rate; the user's own stands between."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    used: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    x, y = data()
    policy = gradwatch.AutoClip("norm", patience=8, escalate=("skip", "rate"), max_skips=3)
    with watch(model, clip=policy) as monitor:
        for step in range(120):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (1e4 if step >= 30 else 1)).backward()
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] == 0.01
    assert min(used) < 0.01
    assert monitor.history.skipped().any() == fused  # others cannot leave a step out there
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    told = " ".join(monitor.notes)
    assert "left out from step" in told
    assert "learning rate x 0.5" in told


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("clips_too", [False, True])
def test_a_first_step_that_overshoots_is_clipped_in_that_step(
    clip: str, clips_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU: the rates are known and the loss lies on the device, so that nothing has to be waited for."""
    steps = {}
    for on_device in (False, True):
        monkeypatch.setattr(device, "reading_is_free", lambda _, free=not on_device: free)
        model = mlp()
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with watch(model, clip=clip) as monitor:
            clips = (lambda _, model=model: nn.utils.clip_grad_norm_(model.parameters(), 1e3)) if clips_too else None
            train(model, optimizer, 1, x_y=(x, 10 * y), each=clips)
        after = [parameter.detach() for parameter in model.parameters()]
        steps[on_device] = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)))
        assert monitor.history.clip_coefficient()[0] < 1, on_device
    assert steps[False] <= steps[True] * 1.001
    assert 0 < steps[True] < 1.001 * 30 * (1 if clip == "norm" else 1e3)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_first_step_is_left_alone_where_nothing_says_that_it_overshoots() -> None:
    """Adam normalises its gradients, and a loss that is large enough can lose that much."""
    for optimizer_of, factor in ((torch.optim.Adam, 1000.0), (torch.optim.SGD, 1.0)):
        model = mlp()
        x, y = data()
        with watch(model, clip="norm") as monitor:
            train(model, optimizer_of(model.parameters(), lr=1e-3), 3, x_y=(x, factor * y))
        assert (monitor.history.clip_coefficient() == 1).all()


@pytest.mark.parametrize("clips_too", [False, True])
def test_a_first_step_that_moves_weights_by_more_than_their_size_is_clipped_in_that_step(
    clips_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the loss holds more than it takes, as on the CPU: the weights lie on the device as well."""
    for on_device in (False, True):
        monkeypatch.setattr(device, "reading_is_free", lambda _, free=not on_device: free)
        model = mlp()
        x, y = data()
        clips = (lambda _, model=model: nn.utils.clip_grad_norm_(model.parameters(), 1e3)) if clips_too else None
        with watch(model, clip="norm") as monitor:
            train(model, torch.optim.SGD(model.parameters(), lr=0.05), 1, x_y=(x, 1e3 * y), each=clips)
        assert monitor.history.clip_coefficient()[0] < 1, on_device
        assert {sign.code for sign in monitor.incidents[0].signs} == {"GW303"}


@pytest.mark.parametrize(("step", "clipped"), [(10, True), (11, False)])
def test_the_first_steps_end_where_the_rules_let_them_end(
    step: int, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is too long is an incident by itself before the twelfth, whether or not the rows before it have arrived."""
    x, y = data()
    for on_device in (False, True):
        monkeypatch.setattr(device, "reading_is_free", lambda _, free=not on_device: free)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def raised(made: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.param_groups[0]["lr"] = 20.0 if made == step else 1e-3

        with watch(model, clip="norm") as monitor:
            train(model, optimizer, step + 1, x_y=(x, 10 * y), each=raised)
        coefficients = monitor.history.clip_coefficient()
        assert (coefficients[:step] == 1).all()
        assert (coefficients[step] < 1) == clipped, on_device
        assert {alarm.code for alarm in monitor._pipeline.changes} >= {"GW303"}
    plans = [monitor._pipeline.plan(ahead) for ahead in range(12)]
    assert not any(plan.early for plan in plans if plan is not None)


def test_an_update_larger_than_the_weights_beside_a_loss_that_suffers_is_clipped_in_that_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long before the norms surge, as on the CPU: the rate has risen too far, and the step before has raised the loss."""
    first = {}
    for on_device in (False, True):
        monkeypatch.setattr(device, "reading_is_free", lambda _, free=not on_device: free)
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def raised(made: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.param_groups[0]["lr"] = 1e-3 if made < 70 else 3.0

        with watch(model, clip="norm") as monitor:
            train(model, optimizer, 80, x_y=data(), each=raised)
        first[on_device] = int(np.flatnonzero(monitor.history.clip_coefficient() < 1)[0])
    assert first == {False: 71, True: 71}


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("damaged", ["2.weight", "4.weight"])
def test_a_layer_whose_weights_were_changed_is_the_suspect_a_step_later(damaged: str) -> None:
    """The row that opens the incident came without weights; those of the next one say where it was done."""
    torch.manual_seed(0)
    model = mlp(depth=4)
    x, y = data(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model) as monitor:
        for step in range(130):
            if step == 100:
                dict(model.named_parameters())[damaged].data.mul_(1000)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert [incident.suspect for incident in monitor.incidents] == [damaged]
    assert f"{damaged} changed its norm by a factor of" in "\n".join(monitor.incidents[0].evidence)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("damaged", ["2.weight", "4.weight"])
def test_a_layer_that_moved_farther_than_its_gradients_explain_is_the_suspect_although_all_have_moved(
    damaged: str,
) -> None:
    """When the weights of the row after the opening come, the explosion has moved all layers, the others by their gradients."""
    torch.manual_seed(0)
    model = mlp(depth=4)
    x, y = data(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with watch(model) as monitor:
        for step in range(104):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if step == 100:
                optimizer.state[dict(model.named_parameters())[damaged]]["momentum_buffer"].mul_(1e6)
            optimizer.step()
    assert [incident.suspect for incident in monitor.incidents] == [damaged]
    assert f"the weights of {damaged} moved " in "\n".join(monitor.incidents[0].evidence)
    assert "times as far within" in "\n".join(monitor.incidents[0].evidence)
