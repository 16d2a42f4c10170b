"""What must hold where gradients lie on a device, by groups. Each check is run on the stand-in by `tests.device.run`."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import device
from tests import modes, test_training_modes, trainings
from tests.trainings import data, mlp, true_norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.history.history import History
    from tests.device.standin import StandIn

    Check = Callable[[StandIn], None]

CHECKS: dict[str, list[Check]] = {}
CLIPS = [clip() for clip in gradwatch.clips.CLIPS.values()]
NEVER = 10**9  # kernels: nothing arrives by itself
FUSED = [("SGD", False), ("SGD", True), ("AdamW", False), ("AdamW", True)]
BOTH = FUSED[1:3]  # both optimizers, and one of them fused


def check(group: str) -> Callable[[Check], Check]:
    """Put a check into a group."""

    def put(one: Check) -> Check:
        CHECKS.setdefault(group, []).append(one)
        return one

    return put


def always(clip: gradwatch.Clip) -> gradwatch.AutoClip:
    """Return the policy that clips each step."""
    return gradwatch.AutoClip(clip, when="always")


def optimizer_of(model: nn.Module, name: str = "SGD", fused: bool = False, lr: float = 0.01) -> torch.optim.Optimizer:
    """Return one of torch's optimizers."""
    made: torch.optim.Optimizer = getattr(torch.optim, name)(
        model.parameters(), lr=lr, **({"fused": True} if fused else {})
    )
    return made


class Run:
    """A training and what was seen of it.

    Args:
        stand_in: its waits are counted during the steps.
        where: the device of each layer, or of all.
        clip: for `gradwatch.attach`; "unwatched" does not attach.
        poison: steps whose loss is NaN.
        scaler: use a gradient scaler: "unscales" calls `unscale_`.
        loss_on: the device on which the loss is computed; None: where the last layer lies.
        user_clip: the norm to which the user clips; None: not at all.
        float64: False for a device that has none.
    """

    def __init__(
        self,
        stand_in: StandIn,
        where: str | tuple[str, ...] = "cuda",
        clip: Any = "unwatched",
        name: str = "SGD",
        fused: bool = False,
        steps: int = 30,
        lag: int = 25,
        poison: tuple[int, ...] = (),
        scaler: str = "",
        loss_on: str | None = None,
        user_clip: float | None = None,
        float64: bool = True,
    ) -> None:
        stand_in.begin(lag)
        self.model = mlp()
        places = (where,) * 3 if isinstance(where, str) else where
        for number, place in enumerate(places):
            self.model[2 * number].to(place)
        self.optimizer = optimizer_of(self.model, name, fused)
        self.monitor = (
            None if clip == "unwatched" else gradwatch.attach(self.model, clip=clip, report=None, strict=True)
        )
        scales = torch.amp.GradScaler("cuda", init_scale=1024.0) if scaler else None
        x, y = data(64)
        last = loss_on or places[-1]
        inputs, target = x.to(places[0]), y.to(last)
        bad = dict.fromkeys(poison, target * math.nan)
        stand_in.begin(lag)
        stand_in.without_float64(on=not float64)
        for step in range(steps):
            self.optimizer.zero_grad()
            hidden = inputs
            for number, place in enumerate(places):
                hidden = self.model[2 * number](hidden.to(place))
                hidden = torch.relu(hidden) if number < 2 else hidden
            loss = nn.functional.mse_loss(hidden.to(last), bad.get(step, target))
            (scales.scale(loss) if scales is not None else loss).backward()
            if scaler == "unscales":
                scales.unscale_(self.optimizer)  # type: ignore[union-attr]
            if user_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), user_clip)
            scales.step(self.optimizer) if scales is not None else self.optimizer.step()
            if scales is not None:
                scales.update()
        self.waits, self.event_waits = stand_in.waits, stand_in.event_waits
        self.lent = {"grad_scale", "found_inf"} & set(vars(self.optimizer))
        if self.monitor is not None:
            self.monitor.detach()

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters at the end, on the CPU."""
        return [parameter.detach().cpu() for parameter in self.model.parameters()]

    @property
    def history(self) -> History:
        """What was recorded."""
        assert self.monitor is not None
        return self.monitor.history


def alike(one: Run, other: Run) -> None:
    """The parameters of two runs are the same to the bit."""
    for mine, its in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(mine, its)


def same_rows(one: Run, other: Run, tolerance: float = 1e-5) -> None:
    """Two runs left the same rows."""
    assert one.history.rows == other.history.rows
    for what in ("loss", "grad_norm", "global_norm", "weight_norm", "clip_coefficient"):
        mine, its = getattr(one.history, what)(), getattr(other.history, what)()
        np.testing.assert_allclose(mine, its, rtol=tolerance, atol=1e-9, err_msg=what)
    assert one.history.skipped().tolist() == other.history.skipped().tolist()


# The stand-in itself sees what it is there to see.


@check("watching")
def every_wait_is_counted(s: StandIn) -> None:
    """The stand-in sees what makes a host wait, and can raise there; what does not wait is free."""
    x = torch.ones(3, device="cuda")
    for wait in (
        lambda: x.sum().item(),
        x.cpu,
        lambda: torch.ones(3).to("cuda"),
        lambda: x.__setitem__(1, 2.0),
        x.nonzero,
        lambda: x[x > 0],
        lambda: bool(x.any()),
        torch.accelerator.synchronize,
    ):
        s.begin()
        assert s.waits == ""
        wait()
        assert s.waits
        s.waits_raise(on=True)
        with pytest.raises(RuntimeError, match="waits for the device"):
            wait()
    s.begin()
    x.fill_(2.0).mul_(3)
    torch.ones(3).to("cuda", non_blocking=True).add_(x)
    assert s.waits == ""


@check("watching")
def a_pinned_copy_is_not_there_before_its_event(s: StandIn) -> None:
    """Whoever reads it earlier reads NaN."""
    x = torch.ones(3, device="cuda")
    assert x.to("cpu", non_blocking=True).isnan().all()
    host = torch.zeros(3).pin_memory()
    host.copy_(x, non_blocking=True)
    event = torch.Event(x.device)
    event.record(torch.accelerator.current_stream(x.device))
    assert not event.query()
    assert host.isnan().all()
    for _ in range(30):
        x.add_(1)
    assert event.query()
    assert host.tolist() == [1, 1, 1]


@check("watching")
def devices_do_not_mix_and_a_capture_is_not_disturbed(s: StandIn) -> None:
    """The stand-in refuses what CUDA refuses."""
    x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    assert torch.add(x, y.to("cuda:0")).tolist() == [2, 2, 2]
    event = torch.Event(x.device)
    event.record(torch.accelerator.current_stream(x.device))
    s.capture(on=True)
    for wrong in (lambda: x + y, lambda: x + torch.ones(3), event.query, event.synchronize, x.sum().item):
        with pytest.raises(RuntimeError, match=r"same device|capturing"):
            wrong()


@check("watching")
def memory_of_a_device_is_closed_to_the_host(s: StandIn) -> None:
    """A process that reads it by mistake dies of it, so that other checks would see it."""
    address = torch.ones(3, device="cuda").data_ptr()
    child = os.fork()
    if child == 0:
        ctypes.string_at(address, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


# One device.


@check("watching")
def watching_changes_nothing_and_leaves_the_rows_of_the_cpu(s: StandIn) -> None:
    """Whenever rows arrive: at once, some kernels later, or not before the ring is full."""
    for name, fused in BOTH:
        plain, cpu = Run(s, name=name, fused=fused, steps=80), Run(s, "cpu", None, name, fused, steps=80)
        for lag in (0, 25, NEVER):
            seen = Run(s, "cuda", None, name, fused, steps=80, lag=lag)
            alike(seen, plain)
            same_rows(seen, cpu)
            assert seen.waits == ""
            assert (seen.event_waits > 0) == (lag == NEVER)  # then the ring is full


@check("watching")
def rows_hold_the_norms_before_the_users_own_clip(s: StandIn) -> None:
    """As on the CPU, and the training is that of an unwatched run."""
    for name, fused in BOTH:
        plain = Run(s, name=name, fused=fused, user_clip=0.05)
        for clip in (None, "norm", "value"):
            seen, cpu = (Run(s, place, clip, name, fused, user_clip=0.05) for place in ("cuda", "cpu"))
            alike(seen, plain)
            same_rows(seen, cpu)
            assert seen.waits == plain.waits
            assert seen.history.provenance.clipped == "before the user's clip"


@check("watching")
def training_modes_agree(s: StandIn) -> None:
    """Each mode against its own dumb loop, under `torch.set_default_device` as well."""
    left_out = ("torch.compile", "sparse")  # neither has the stand-in

    def on_the_device(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **settings: Any) -> Any:
            with torch.device("cpu"):
                one = make(*args, **settings)
            return one.to("cuda") if isinstance(one, nn.Module) else tuple(part.to("cuda") for part in one)

        return made

    before = data, mlp
    torch.set_default_device("cuda")
    try:
        for module in (modes, trainings, test_training_modes):
            module.data, module.mlp = on_the_device(data), on_the_device(mlp)  # type: ignore[attr-defined]
        for mode in modes.MODES:
            if not any(word in mode.name for word in left_out):
                s.begin()
                try:
                    test_training_modes.check(mode)
                except Exception as error:
                    raise AssertionError(mode.name) from error
    finally:
        torch.set_default_device(None)
        for module in (modes, trainings, test_training_modes):
            module.data, module.mlp = before  # type: ignore[attr-defined]


@check("watching")
def reentrant_checkpoints_on_device_threads_are_one_backward(s: StandIn) -> None:
    """Their backwards are called by threads of autograd, from inside a backward."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 1)).to("cuda")
    optimizer = optimizer_of(model)
    losses = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(8):
            optimizer.zero_grad()
            hidden = torch.randn(16, 8).to("cuda").requires_grad_()
            for part in list(model)[:4]:
                hidden = checkpoint(part, hidden, use_reentrant=True)
            loss = model[4](hidden).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)
    assert monitor.history.order is not None
    assert monitor.history.order.tolist() == list(range(10))[::-1]
    assert monitor._probe.attribution.backwards == 8


@check("watching")
def a_loss_that_is_overwritten_later_is_recorded_as_it_was(s: StandIn) -> None:
    """Both the one that a backward began from, and the one that was handed over."""
    model = mlp().to("cuda")
    optimizer = optimizer_of(model)
    x, y = (part.to("cuda") for part in data())
    losses = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(12):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            losses.append(loss.item())
            if step >= 6:
                monitor.loss(loss)
            loss.backward()
            loss.detach().fill_(7.0)  # as the next replay of a CUDA graph does
            optimizer.step()
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)


@check("watching")
def parts_that_no_longer_train_are_told_as_on_the_cpu(s: StandIn) -> None:
    """One whose gradient stops, one that is frozen, and one that is unfrozen although no optimizer holds it."""
    told: dict[str, list[object]] = {}
    for where in ("cpu", "cuda"):
        x, y = (part.to(where) for part in data(64))
        torch.manual_seed(0)
        stops, freezes, late = (mlp(inputs=8).to(where) for _ in range(3))
        late.requires_grad_(requires_grad=False)
        model = nn.ModuleList([stops, freezes, late])
        optimizer = torch.optim.Adam([*stops.parameters(), *freezes.parameters()], lr=1e-4)
        s.begin()
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for step in range(400):
                freezes.requires_grad_(requires_grad=step < 100)
                late.requires_grad_(requires_grad=step >= 100)
                optimizer.zero_grad()
                outputs = [part(x) for part in (stops, freezes, late)[step >= 200 :]]
                sum(nn.functional.mse_loss(one, y) for one in outputs).backward()  # type: ignore[union-attr]
                optimizer.step()
            assert s.waits == ""
        told[where] = [[one.kind, one.suspect, one.signs[0].words, one.advice[0]] for one in monitor.incidents]
        told[where] += monitor.notes
    assert told["cpu"] == told["cuda"]
    assert [line[:2] for line in told["cpu"]] == [["frozen", "2.0.weight"], ["dead", "0.0.weight"]], told  # type: ignore[index]


@check("watching")
def gradients_set_to_zero_after_a_left_out_step_take_its_loss_along(s: StandIn) -> None:
    """They are not read for that."""
    model = mlp().to("cuda")
    optimizer = optimizer_of(model)
    x, y = (part.to("cuda") for part in data())
    losses = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(30):
            optimizer.zero_grad(set_to_none=False)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if step % 3 == 1:
                continue
            losses.append(loss.item())
            s.waits_raise(on=True)
            optimizer.step()
            s.waits_raise(on=False)
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)


@check("watching")
def a_watched_step_needs_a_hundredth_more_memory(s: StandIn) -> None:
    """A hundredth of the gradients, in a unit check too and where the user clips."""

    def peak(clip: Any, user_clip: float | None) -> int:
        gc.collect()  # of the run before
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 4000)).to("cuda")
        optimizer = optimizer_of(model, fused=True, lr=1e-4)
        monitor = None if clip == "unwatched" else gradwatch.attach(model, clip=clip, report=None, strict=True)
        x = torch.randn(4, 500).to("cuda")
        for step in range(7):  # of which one checks units
            optimizer.zero_grad()
            if step == 2:
                s.begin()
            model(x).square().mean().backward()
            if user_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), user_clip)
            optimizer.step()
        if monitor is not None:
            monitor.detach()
        return s.peak

    gradients = 4 * (500 * 501 + 4000 * 501)
    agc = always(gradwatch.ClipAGC(1e-9))
    for user_clip, clips in ((None, ("norm", "layer norm", agc)), (1e9, (None, "value"))):
        plain = peak("unwatched", user_clip)
        for clip in clips:
            assert peak(clip, user_clip) <= plain + 0.01 * gradients, (clip, user_clip)


class Passes(TorchDispatchMode):
    """Counts the calls, beside the optimizer's own, that compute with whole gradients or write to them."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [one for one in given if isinstance(one, Tensor) and one.untyped_storage().data_ptr() in self._memory]
        if tensors and not func.is_view and "fused" not in name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _launches(s: StandIn, clip: Any, *, fused: bool, user_clips: bool = False) -> tuple[int, Counter[str]]:
    """Return the launches of a quiet step with 150 gradients of two shapes once the run is settled, and its passes over them."""
    shapes = [(6, 5), (6,)]
    model = nn.ParameterList([torch.ones(shapes[number % 2]) for number in range(150)]).to("cuda")
    parameters = list(model)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    gradients = [parameter.grad for parameter in parameters]
    optimizer = optimizer_of(model, "SGD", fused, lr=1e-6)
    loss = torch.ones((), device="cuda")
    found = []
    monitor = None if clip == "unwatched" else gradwatch.attach(model, clip=clip, report=None, strict=True)
    for step in range(38):  # weights are sampled in the first 32
        if step == 37:
            passes = Passes(gradients)
            with passes:
                optimizer.step()
            break
        s.begin()
        if monitor is not None:
            monitor.loss(loss)
        if user_clips:
            nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        found.append(s.launches)
    if monitor is not None:
        monitor.detach()
    return found[-1], passes.calls


@check("watching")
def a_quiet_step_takes_few_launches_and_passes(s: StandIn) -> None:
    """Beside a plain one of 150 tensors, with nothing to clip."""
    own = _launches(s, "unwatched", fused=True, user_clips=True)[0] - _launches(s, "unwatched", fused=True)[0]
    assert own == 8  # of `clip_grad_norm_`
    most = {None: own + 10, "norm": own + 37, "value": own + 37, "layer norm": own + 37, "agc": own + 37}
    for fused, clips in ((True, list(most)), (False, [None, "norm"])):
        plain, passes = _launches(s, "unwatched", fused=fused)
        seen = {clip: _launches(s, clip, fused=fused) for clip in clips}
        more = {clip: launches - plain for clip, (launches, _) in seen.items()}
        assert all(more[clip] <= most[clip] + 2 * (not fused) for clip in clips), more
        both = [seen[clip][1] - passes for clip in (None, "norm")]
        assert both[0] == Counter(_foreach_norm=1)
        # if the optimizer is fused, it takes the factor; otherwise there are one for the factor and one for steps left out
        assert both[1] == (both[0] if fused else Counter(_foreach_norm=1, _foreach_mul_=2))


# Auto-clip.


@check("clips")
def no_clip_waits_nor_touches_a_healthy_step(s: StandIn) -> None:
    """Armed by each clip, parameters stay those of the unwatched run to the bit."""
    for fused in (False, True):
        plain = Run(s, name="AdamW", fused=fused, steps=40)
        for clip in CLIPS if fused else ("norm", "value", "layer norm", "agc"):
            seen = Run(s, "cuda", clip, "AdamW", fused, steps=40)
            alike(seen, plain)
            assert seen.waits == "", clip
            assert seen.event_waits == 0
            assert seen.history.rows == 40
            assert not any("switched off" in note for note in seen.monitor.notes)  # type: ignore[union-attr]


@check("clips")
def a_bias_that_had_only_rounding_noise_is_not_clipped_once_it_has_a_gradient(s: StandIn) -> None:
    """As when the normalisation after it is frozen; the gradient of its weight shows that nothing explodes."""
    verdicts = []
    for where in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).to(where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(300):
                if step == 200:
                    model[1].eval().requires_grad_(requires_grad=False)
                x = torch.randn(64, 8)
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x.to(where)), 3 * x[:, :4].to(where)).backward()
                optimizer.step()
        noise, gradient = monitor.history.grad_norm()[[150, 200], 1]
        assert gradient > 1e4 * noise > 0
        assert set(monitor.history.clip_coefficient()) == {1.0}, where
        verdicts.append((monitor.verdict, len(monitor.incidents)))
    assert verdicts == [("healthy", 0)] * 2


@check("clips")
def every_clip_does_what_it_does_on_the_cpu(s: StandIn) -> None:
    """The same coefficients, the same parameters."""
    bounds: list[gradwatch.Clip] = [
        gradwatch.ClipNorm(0.05),
        gradwatch.ClipValue(0.01),
        gradwatch.ClipLayerNorm(0.02),
        gradwatch.ClipAGC(0.01),
        gradwatch.ScaleToNorm(0.05),
        gradwatch.ClipNormThenValue(0.05, 0.01),
    ]
    for fused in (False, True):
        for clip in bounds:
            seen, cpu = (Run(s, place, always(clip), "SGD", fused) for place in ("cuda", "cpu"))
            assert seen.waits == "", clip
            assert (seen.history.clip_coefficient() != 1).all()
            same_rows(seen, cpu, 1e-4)
            for mine, its in zip(seen.parameters, cpu.parameters, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@check("clips")
def a_clip_of_the_users_own_acts_if_it_knows_devices(s: StandIn) -> None:
    """The same rows as on the CPU."""

    class Half(gradwatch.Clip):
        """Halves."""

        def apply(self, step: gradwatch.clips.Step) -> float:
            """See `gradwatch.Clip`."""
            for gradient in step.gradients:
                gradient.mul_(0.5)
            return 0.5

        def apply_unread(self, step: gradwatch.clips.UnreadStep) -> Tensor:
            """See `gradwatch.Clip`."""
            for gradient in step.gradients:
                gradient.mul_(0.5)
            return torch.full_like(step.global_norm, 0.5)

        def loosened(self, factor: float) -> Half:
            """See `gradwatch.Clip`."""
            return self

    seen, cpu = (Run(s, place, always(Half())) for place in ("cuda", "cpu"))
    assert seen.waits == ""
    same_rows(seen, cpu)


@check("clips")
def poisoned_steps_are_skipped_as_on_the_cpu(s: StandIn) -> None:
    """In the very step and for real where the optimizer is fused; no NaN reaches the others either."""
    poison = (21, 22, 36)
    for name, fused in FUSED:
        for clip in ("norm", "value"):
            seen, cpu = (Run(s, place, clip, name, fused, steps=44, poison=poison) for place in ("cuda", "cpu"))
            assert seen.waits == ""
            assert all(parameter.isfinite().all() for parameter in seen.parameters)
            if fused:
                assert np.flatnonzero(seen.history.skipped()).tolist() == list(poison)
                same_rows(seen, cpu)
                opened = [(one.kind, one.opened_step) for one in cpu.monitor.incidents]  # type: ignore[union-attr]
                assert [(one.kind, one.opened_step) for one in seen.monitor.incidents] == opened  # type: ignore[union-attr]


@check("clips")
def a_quiet_run_with_a_surge_is_clipped_in_that_step(s: StandIn) -> None:
    """Although no rule has seen it yet, and nothing was waited for."""
    for fused in (False, True):
        model = mlp().to("cuda")
        optimizer = optimizer_of(model, fused=fused)
        x, y = (part.to("cuda") for part in data())
        surge = 1e4 * y
        s.begin()
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(160):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), surge if step == 130 else y).backward()
                optimizer.step()
            assert s.waits == ""
            assert s.event_waits == 0
        coefficients = monitor.history.clip_coefficient()
        assert np.flatnonzero(coefficients < 1).tolist()[0] == 130
        assert coefficients[130] < 1e-2


@check("clips")
def an_incident_closes_without_a_wait(s: StandIn) -> None:
    """Whether weights and buffers are finite then is known from the rows that have come."""
    x, y = (part.to("cuda") for part in data(64))
    for damaged in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(mlp(inputs=8), nn.BatchNorm1d(1)).to("cuda")
        model.register_buffer("average", torch.zeros(3, device="cuda"))
        optimizer = optimizer_of(model, fused=True)
        s.begin()
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(160):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                (loss * (1e5 if 70 <= step < 74 else 1)).backward()
                optimizer.step()
                if damaged and step == 72:
                    model.average.fill_(math.inf)  # type: ignore[operator]
            assert s.waits == ""
        record = next(one.clip for one in monitor.incidents if one.clip is not None)
        assert record.released_step is not None
        assert record.damage == ("a buffer was not finite when it was last checked" if damaged else "")


@check("clips")
def a_gradient_scaler_finds_its_optimizer_as_it_left_it(s: StandIn) -> None:
    """Armed or not, with and without `unscale_`."""
    for scaler in ("scales", "unscales"):
        for name, fused in FUSED:
            plain = Run(s, name=name, fused=fused, scaler=scaler, steps=16)
            for clip in (None, "norm", "value"):
                seen = Run(s, "cuda", clip, name, fused, scaler=scaler, steps=16)
                alike(seen, plain)
                assert seen.waits == plain.waits  # the scaler's own, where the optimizer is not fused
                assert seen.lent == set()
                assert seen.history.rows == 16


@check("clips")
def auto_clip_ends_as_on_the_cpu_though_it_has_changed_no_step(s: StandIn) -> None:
    """A batch with NaN that the program leaves out itself, by which a buffer is broken; an outlier later is clipped again."""
    ends = []
    for place in ("cpu", "cuda"):
        s.begin()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)).to(place)
        optimizer = optimizer_of(model, "SGD", fused=True)
        x = torch.randn(64, 10, generator=torch.Generator().manual_seed(1)).to(place)
        y = x[:, :1] - x[:, 1:2]
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for number in range(300):
                loss = nn.functional.mse_loss(
                    model(x * (math.nan if number == 40 else 1)), y * (400 if number == 200 else 1)
                )
                if number != 40:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        first, second, *_ = monitor.incidents
        assert (first.kind, second.kind) == ("nonfinite", "exploding"), place
        assert first.closed_step is not None
        assert first.closed_step < 100, place
        assert second.clip is not None
        assert second.clip.clipped > 0, place
        ends.append(loss.item())
    assert math.isclose(*ends, rel_tol=0.1), ends


@check("clips")
def a_search_for_a_loss_scale_is_no_incident(s: StandIn) -> None:
    """It takes a dozen halvings of the usual first scale to bring such gradients into the range of float32."""
    x, y = (one.cuda() for one in data(64))
    for name, fused in FUSED[:2]:
        model = mlp().cuda()
        optimizer, scaler = optimizer_of(model, name, fused, lr=1e-40), torch.amp.GradScaler("cuda")
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(40):
                optimizer.zero_grad()
                loss = 1e37 * nn.functional.mse_loss(torch.tanh(model(x)), y.clamp(-1, 1))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert scaler.get_scale() <= 2**5
        assert monitor.incidents == [], name
        assert monitor.history.rows > 20


@check("clips")
def what_a_step_that_raised_was_lent_is_not_taken_from_the_next(s: StandIn) -> None:
    """The next step may be of a gradient scaler, which sets the same attributes."""
    model = mlp().to("cuda")
    optimizer = optimizer_of(model, "AdamW", fused=True)
    raises = [False]

    def fail(*_: Any) -> None:
        if raises[0]:
            raise KeyError("the user's own")

    x, y = (part.to("cuda") for part in data())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        optimizer.register_step_pre_hook(fail)
        for step in range(6):
            raises[0] = step == 3
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            try:
                if raises[0]:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
            except KeyError:
                assert vars(optimizer)["found_inf"] is not None
            else:
                assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        assert (monitor.history.global_norm() < 10).all()  # without the scale


# Several devices.


@check("clips")
def a_model_over_two_devices_is_one(s: StandIn) -> None:
    """Wherever the loss lies, and with it the loss scale."""
    where = ("cuda:0", "cuda:1", "cuda:1")
    cpu = Run(s, "cpu", None, steps=20)
    for scaler, fused in (("", False), ("scales", False), ("scales", True)):
        for loss_on in where[:2]:
            settings: Any = {"fused": fused, "scaler": scaler, "loss_on": loss_on, "steps": 20}
            plain = Run(s, where, **settings)
            every = fused and loss_on == "cuda:1"
            for clip in (None, *CLIPS) if every else (None, "norm", always(gradwatch.ClipLayerNorm(1e9))):
                seen = Run(s, where, clip, **settings)
                alike(seen, plain)
                assert seen.waits == plain.waits, clip
                same_rows(seen, cpu)


@check("clips")
def a_model_partly_on_the_cpu_is_never_clipped_by_numbers_that_have_not_come(s: StandIn) -> None:
    """It is that of an unwatched run to the bit, and a poisoned step is left out in both parts."""
    places = {("cpu", "cuda", "cuda"): [*FUSED, ("Adagrad", True)], ("cuda", "cpu", "cuda"): BOTH}
    for where, optimizers in places.items():
        for name, fused in optimizers:
            plain, cpu = Run(s, where, name=name, fused=fused, steps=20), Run(s, "cpu", None, name, fused, steps=20)
            for clip in (None, "norm", "value", always(gradwatch.ClipAGC(1e9)), always(gradwatch.ClipNorm(1e9))):
                seen = Run(s, where, clip, name, fused, steps=20)
                alike(seen, plain)
                same_rows(seen, cpu)
                if clip is None:
                    assert seen.waits == plain.waits
            if fused:
                seen, cpu = (Run(s, place, "norm", name, fused, steps=20, poison=(15,)) for place in (where, "cpu"))
                same_rows(seen, cpu)
                assert np.flatnonzero(seen.history.skipped()).tolist() == [15]


@check("watching")
def a_model_that_moves_is_measured_wherever_it_is(s: StandIn) -> None:
    """As a whole or in part, with all rows in order."""
    model = mlp()
    optimizer = optimizer_of(model)
    truth: list[list[float]] = []
    x, y = data()
    tour = [
        "cpu",
        "cuda:0",
        "cuda:1",
        ("cpu", "cuda:0", "cuda:0"),
        ("cuda:0", "cuda:0", "cuda:1"),
        "cpu",
        ("cuda:0", "cpu", "cpu"),
    ]
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(140):
            place = tour[step // 20]
            places = (place,) * 3 if isinstance(place, str) else place
            if step % 20 == 0:
                for number, there in enumerate(places):
                    model[2 * number].to(there)
            optimizer.zero_grad()
            hidden = x
            for number, there in enumerate(places):
                hidden = model[2 * number](hidden.to(there))
                hidden = torch.relu(hidden) if number < 2 else hidden
            nn.functional.mse_loss(hidden, y.to(hidden.device)).backward()
            truth.append([true_norm(one.grad.cpu()) for one in model.parameters() if one.grad is not None])
            optimizer.step()
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)
    assert not any("switched off" in note for note in monitor.notes)


@check("watching")
def buffers_are_left_out_with_the_step(s: StandIn) -> None:
    """Of running statistics on another device than the norms too; where that cannot be, no step is called skipped."""
    x, y = data(64)
    for first, last, can in (("cuda:0", "cuda:0", True), ("cuda:0", "cuda:1", True), ("cuda:0", "cpu", False)):
        s.begin()
        torch.manual_seed(0)
        halves = [nn.Linear(8, 4).to(first), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).to(last)]
        model = nn.ModuleList(halves)
        optimizer = optimizer_of(model, "AdamW", fused=True)
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(12):
                before = [part.detach().cpu().clone() for part in (*model.parameters(), *model.buffers())]
                optimizer.zero_grad()
                inputs = (x * math.nan if step == 8 else x).to(first)
                nn.functional.mse_loss(halves[1](halves[0](inputs).to(last)), y.to(last)).backward()
                optimizer.step()
                now = [part.detach().cpu() for part in (*model.parameters(), *model.buffers())]
                if can:
                    same = all(torch.equal(one, other) for one, other in zip(now, before, strict=True))
                    assert same == (step == 8)
        assert np.flatnonzero(monitor.history.skipped()).tolist() == ([8] if can else [])
        assert can or any("buffers of the model are on the CPU" in note for note in monitor.notes)


@check("watching")
def losses_on_two_devices_add_up(s: StandIn) -> None:
    """Also where more backwards come than are kept apart."""
    halves = [nn.Linear(8, 1).to(f"cuda:{number}") for number in (0, 1)]
    model = nn.ModuleList(halves)
    optimizer = optimizer_of(model)
    x, y = data()

    def losses() -> list[Tensor]:
        return [nn.functional.mse_loss(half(x.to(half.weight.device)), y.to(half.weight.device)) for half in halves]

    truth = []
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(10):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(1 if step < 9 else 80):  # more than are kept apart
                both = losses()
                torch.autograd.backward(both)
                total += sum(loss.item() for loss in both)
            truth.append(total)
            optimizer.step()
    np.testing.assert_allclose(monitor.history.loss(), truth, rtol=1e-5)


def _a_step_with_clip(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@check("watching")
def nothing_is_asked_while_a_graph_is_captured(s: StandIn) -> None:
    """It is said once, by the monitor of that model alone, and later steps are recorded."""
    for clip in (None, "norm", "value"):
        s.begin()
        model, other = mlp().to("cuda"), mlp().to("cuda")
        optimizer = optimizer_of(model, "AdamW")
        x, y = (part.to("cuda") for part in data())
        monitor = gradwatch.attach(model, clip=clip, report=None, strict=True)
        unconcerned = gradwatch.attach(other, report=None, strict=True)

        step = partial(_a_step_with_clip, model, optimizer, x, y)
        step()  # hooks still learn the order
        s.begin()
        s.capture(on=True)
        for _ in range(2):
            monitor.loss(step())
            assert monitor.incidents == []
            assert not monitor.checkpoint_guard()
            monitor.step()
        assert s.questions == 0
        s.capture(on=False)
        for _ in range(3):
            step()
        monitor.detach()
        unconcerned.detach()
        assert monitor.history.rows == 4
        assert [note for note in monitor.notes if "CUDA graph" in note] == monitor.notes[-1:]
        assert unconcerned.notes == []


@check("watching")
def rows_wait_while_another_thread_captures_a_graph(s: StandIn) -> None:
    """CUDA refuses to say whether they have arrived; nothing is lost, and nothing fails."""
    for clip in (None, "norm"):
        s.begin(0)
        model = mlp().to("cuda")
        optimizer = optimizer_of(model, "AdamW", fused=True)
        x, y = (part.to("cuda") for part in data())
        with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
            step = partial(_a_step_with_clip, model, optimizer, x, y)
            for captured in (False, True, False):
                s.capture(on=captured, here=False)
                for _ in range(4):
                    step()
                arrived = monitor.history.rows
                assert arrived <= 4 if captured else arrived > 0
        assert monitor.history.rows == 12
        assert monitor.notes == []


@check("watching")
def the_default_device_is_nothing_to_the_monitor(s: StandIn) -> None:
    """It may be another one than the model's."""
    torch.set_default_device("cuda:1")
    try:
        with torch.device("cpu"):
            plain = Run(s, "cuda:0", steps=70)
        seen = []
        for clip in (None, "norm", "layer norm", "agc"):
            with torch.device("cpu"):
                model = mlp().to("cuda:0")
                x, y = (part.to("cuda:0") for part in data(64))
            optimizer = optimizer_of(model)
            s.begin()
            with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
                for _ in range(70):
                    optimizer.zero_grad()
                    nn.functional.mse_loss(model(x), y).backward()
                    optimizer.step()
                assert s.waits == ""
            seen.append([parameter.detach().cpu() for parameter in model.parameters()])
            assert monitor.history.rows == 70
    finally:
        torch.set_default_device(None)
    for parameters in seen:
        assert all(torch.equal(mine, its) for mine, its in zip(parameters, plain.parameters, strict=True))


# Devices that know less.


@check("watching")
def neither_float64_nor_index_copy_is_needed(s: StandIn) -> None:
    """As on Metal and some Intel GPUs; numbers are those of the CPU in float32."""
    wide = device.widest_float
    device.widest_float = lambda home: torch.float32 if home.type == "cuda" else wide(home)  # type: ignore[assignment]
    s.without("index_copy_")
    s.without("index_copy.out")
    with pytest.raises(NotImplementedError):
        torch.zeros(2, device="cuda").index_copy_(
            0, torch.zeros(1, dtype=torch.int64, device="cuda"), torch.ones(1, device="cuda")
        )
    cpu = Run(s, "cpu", None, steps=40, user_clip=0.5)
    for clip in (None, *CLIPS, *map(always, CLIPS)):
        seen = Run(s, "cuda", clip, fused=True, steps=40, user_clip=0.5, float64=False)
        assert seen.history.rows == 40, seen.monitor.notes  # type: ignore[union-attr]
        assert seen.waits == "", clip
        if clip is None:
            same_rows(seen, cpu, 1e-4)
