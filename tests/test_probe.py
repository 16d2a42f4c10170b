"""When a step is measured, and that the numbers are those of a dumb loop."""

from __future__ import annotations

import gc
import math
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.forensics.call import Call
from gradwatch.forensics.inspector import Inspector
from gradwatch.probe import patches
from gradwatch.probe.attribution import Attribution
from gradwatch.probe.fast_path import FastPath
from gradwatch.probe.step_recorder import StepRecorder
from gradwatch.skipping.buffers import Buffers
from tests.trainings import data, mlp, train, true_norms

if TYPE_CHECKING:
    from collections.abc import Callable


def watch(model: nn.Module, **settings: object) -> gradwatch.Monitor:
    """Attach silently and strictly."""
    return gradwatch.attach(model, report=None, strict=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_each_optimizer_step_leaves_one_row_with_the_true_norms(name: str) -> None:
    """Any torch optimizer is found by itself; norms agree with a loop within 1e-6."""
    model = mlp()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    truth: list[list[float]] = []
    with watch(model) as monitor:
        losses = train(model, optimizer, 12, each=lambda _: truth.append(true_norms(model)))
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)
    np.testing.assert_allclose(
        monitor.history.global_norm(), [math.sqrt(sum(n * n for n in row)) for row in truth], rtol=1e-6
    )
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)
    assert monitor.history.facts.optimizer == name
    assert monitor.history.provenance.source == "optimizer step"


def test_weight_norms_are_those_before_the_update() -> None:
    """The first row holds the norms of the initial weights."""
    model = mlp()
    before = [parameter.detach().norm().item() for parameter in model.parameters()]
    with watch(model) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    np.testing.assert_allclose(monitor.history.weight_norm(last=1)[0], before, rtol=1e-6)


def test_weights_are_sampled_each_of_the_first_steps_and_then_every_sixteenth() -> None:
    """On a healthy run, and now and then on a step that is out of the ordinary."""
    model = mlp()
    with watch(model) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 100)
    sampled = np.flatnonzero(~np.isnan(monitor.history.weight_norm()[:, 0]))
    due = {*range(32), 47, 63, 79, 95}
    assert due <= set(sampled.tolist())
    assert len(sampled) <= len(due) + 4


def test_accumulated_gradients_are_measured_once_at_the_step() -> None:
    """Four backwards, one row, the norm of the sum, the loss of all four."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            losses = [
                nn.functional.mse_loss(model(part), target) / 4
                for part, target in zip(x.chunk(4), y.chunk(4), strict=True)
            ]
            for loss in losses:
                loss.backward()
            truth = true_norms(model)
            optimizer.step()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
            assert monitor.history.loss(last=1)[0] == pytest.approx(sum(loss.item() for loss in losses))
    assert monitor.history.rows == 3


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_is_measured_after_it_ran(as_keyword: bool) -> None:
    """Gradients and loss are those of the closure, not the stale ones before it."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    truth, losses = [], []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        truth.append(true_norms(model))
        losses.append(loss.item())
        return loss

    with watch(model) as monitor:
        for _ in range(4):
            if as_keyword:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)
    np.testing.assert_allclose(monitor.history.loss(), losses)
    assert monitor.history.provenance.source == "closure"


def test_a_line_search_leaves_one_row_a_step_and_is_never_clipped() -> None:
    """LBFGS evaluates many times; its first evaluation is the row, and its gradients are its own."""
    x, y = data()

    def run(attach: bool) -> list[torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=5)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y * 1000)
            loss.backward()
            return loss

        monitor = watch(model, clip=gradwatch.AutoClip("norm", when="always")) if attach else None
        for _ in range(3):
            optimizer.step(closure)
        if monitor is not None:
            monitor.detach()
            assert monitor.history.rows == 3
        return [parameter.detach().clone() for parameter in model.parameters()]

    for watched, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(watched, plain)


def by_hand(model: nn.Module, steps: int, update: Callable[[nn.Module], None]) -> list[list[float]]:
    """Train without a torch optimizer; return the true norms of each step."""
    x, y = data()
    truth = []
    for _ in range(steps):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        truth.append(true_norms(model))
        update(model)
    return truth


def descend(model: nn.Module) -> None:
    """Plain gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.01 * parameter.grad)


def test_a_loop_without_any_torch_optimizer_is_measured_at_the_end_of_backward() -> None:
    """Once it is seen that weights move without an optimizer: from the second backward on."""
    model = mlp()
    with watch(model) as monitor:
        truth = by_hand(model, 6, descend)
    np.testing.assert_allclose(monitor.history.grad_norm(), truth[1:], rtol=1e-6)
    assert monitor.history.provenance.source == "end of backward"


def test_such_a_loop_is_clipped_in_time_too() -> None:
    """The gradients that the user's own update reads are the clipped ones."""
    model = mlp()
    seen = []

    def update(model: nn.Module) -> None:
        seen.append(math.sqrt(sum(norm * norm for norm in true_norms(model))))
        descend(model)

    with watch(model, clip=gradwatch.AutoClip(gradwatch.ClipNorm(0.01), when="always")):
        by_hand(model, 5, update)
    assert seen[1:] == pytest.approx([0.01] * 4, rel=1e-3)


def test_monitor_step_says_when_the_update_is_about_to_happen() -> None:
    """For loops by hand that accumulate."""
    model = mlp()
    with watch(model) as monitor:

        def update(model: nn.Module) -> None:
            monitor.step()
            descend(model)

        truth = by_hand(model, 4, update)
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)
    assert monitor.history.provenance.source == "monitor.step()"


def test_the_users_own_clip_is_seen_through() -> None:
    """The recorded norm is the one before `clip_grad_norm_`, labelled so; what was left of it is recorded beside it."""
    model = mlp()
    truth = []

    def clip(_: int) -> None:
        truth.append(true_norms(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    with watch(model) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 5, each=clip)
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)
    assert monitor.history.provenance.clipped == "before the user's clip"
    np.testing.assert_allclose(
        monitor.history.clip_coefficient() * monitor.history.global_norm(), [0.01] * 5, rtol=1e-3
    )


def test_the_loss_of_another_models_backward_is_not_taken() -> None:
    """Only a backward that reaches the watched parameters counts."""
    model, other = mlp(), mlp(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    with watch(model) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(other(x), y + 100).backward()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item())


def test_the_users_own_loss_outranks_every_other() -> None:
    """`monitor.loss` returns the loss unchanged and is the one recorded."""
    model = mlp()
    with watch(model) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3, each=lambda step: monitor.loss(float(step)))
    assert monitor.history.loss().tolist() == [0.0, 1.0, 2.0]
    assert monitor.history.provenance.loss == "monitor.loss()"


def test_without_any_loss_the_loss_rules_say_so_once() -> None:
    """A root that is no scalar is no loss."""
    model = mlp()
    x, _ = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model) as monitor:
        for _ in range(90):
            optimizer.zero_grad()
            output = model(x)
            output.backward(torch.ones_like(output))
            optimizer.step()
    assert [note for note in monitor.notes if "no loss seen" in note] == monitor.notes
    assert len(monitor.notes) == 1
    assert np.isnan(monitor.history.loss()).all()


def test_the_order_of_arrival_is_learned_and_then_no_hook_is_left() -> None:
    """Three backwards with a hook per parameter; afterwards none, until an incident is open."""
    model = mlp(depth=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        hooks = monitor._probe.gradient_hooks
        assert len(hooks) == 8
        train(model, optimizer, 3)
        assert len(hooks) == 0
        assert hooks.order is not None
        last_layer, first_layer = hooks.order[6:], hooks.order[:2]
        assert max(last_layer) < min(first_layer)
        hooks.follow(closely=True)
        assert len(hooks) == 8
        hooks.follow(closely=False)
        assert len(hooks) == 0


def test_tied_parameters_are_one_layer_with_two_names() -> None:
    """They are measured once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with watch(model) as monitor:
        assert monitor.history.layers == ("0.weight", "0.bias", "1.bias")


def test_parameters_without_a_gradient_are_missing_not_zero() -> None:
    """A frozen layer has NaN norms, and starts to have numbers when it is unfrozen."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        train(model, optimizer, 2)
        assert np.isnan(monitor.history.grad_norm()[:, :2]).all()
        model[0].requires_grad_(True)
        train(model, optimizer, 2)
        assert (monitor.history.grad_norm(last=2) > 0).all()


def test_a_step_that_raises_leaves_the_monitor_working() -> None:
    """The next step is measured as ever."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type]
    with watch(model) as monitor:
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, 1)
        handle.remove()
        train(model, optimizer, 3)
        assert monitor.history.rows == 4


def test_a_subclass_that_calls_super_step_is_measured_once() -> None:
    """One row for one step."""

    class Subclass(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # an instance of the base class wraps its step as well
    model = mlp()
    with watch(model) as monitor:
        train(model, Subclass(model.parameters(), lr=0.01), 4)
        assert monitor.history.rows == 4


def test_two_monitors_on_two_models_keep_apart() -> None:
    """Each sees its own steps; the patches stay until the last one leaves."""
    one, other = mlp(), mlp(seed=1)
    first, second = watch(one), watch(other)
    train(one, torch.optim.SGD(one.parameters(), lr=0.01), 3)
    assert (first.history.rows, second.history.rows) == (3, 0)
    first.detach()
    assert patches.BACKWARD.installed
    train(other, torch.optim.SGD(other.parameters(), lr=0.01), 2)
    assert (first.history.rows, second.history.rows) == (3, 2)
    second.detach()


def test_every_measures_each_nth_step_only() -> None:
    """With `every=4`, ten steps leave rows 0, 4 and 8."""
    model = mlp()
    with watch(model, every=4) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 10)
    assert monitor.history.steps().tolist() == [0, 4, 8]


def test_gradients_added_to_an_optimizer_later_are_measured() -> None:
    """`add_param_group` is noticed at the next step."""
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[2:], lr=0.01)
    with watch(model) as monitor:
        train(model, optimizer, 1)
        assert np.isnan(monitor.history.grad_norm(last=1)[0, :2]).all()
        optimizer.add_param_group({"params": parameters[:2]})
        train(model, optimizer, 1)
        assert (monitor.history.grad_norm(last=1) > 0).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_under_a_gradient_scaler_numbers_come_without_the_scale(*, fused: bool, unscale: bool, given: bool) -> None:
    """Norms and loss are those of the unscaled loss, whoever unscales; auto-clip clips in the same units."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clip = gradwatch.AutoClip(gradwatch.ClipValue(1e-3), when="always")
    with watch(model, clip=clip, scaler=scaler if given else None) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            scaler.scale(loss).backward()
            truth = [norm / 1024 for norm in true_norms(model)]
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
            assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item(), rel=1e-6)
            moved = max((p.detach() - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))
            assert moved == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_no_row_and_no_incident(*, fused: bool) -> None:
    """An overflow is how a scaler finds its scale."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with watch(model) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) * 1e3
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert 0 < monitor.history.rows < 10
        assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item(), rel=1e-5)
        assert not [incident for incident in monitor.incidents if incident.kind == "nonfinite"]


@pytest.mark.parametrize(("scale", "told"), [(2.0**40, False), (2.0**16, True)])
def test_a_scale_that_begins_high_is_searched_without_an_incident(scale: float, *, told: bool) -> None:
    """As many steps may be left out as it takes to come down to a scale of 1; beyond that it is a fault."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with watch(model) as monitor:
        for step in range(40):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if step < 24:  # as of float16, of which products this large overflow
                for parameter in model.parameters():
                    parameter.grad.fill_(math.inf)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
        assert bool(monitor.incidents) is told


def test_detach_leaves_nothing_registered_and_a_dropped_optimizer_is_forgotten() -> None:
    """No finalizer on model or optimizer, nothing to run at exit; the gradients of an optimizer that is gone are let go."""
    registered = weakref.finalize._registry  # type: ignore[attr-defined]
    train(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), 1)  # what torch itself registers at a first step
    model = mlp()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for _ in range(3)]
    before = len(registered)
    for _ in range(2):
        with watch(model) as monitor:
            for optimizer in optimizers:
                train(model, optimizer, 2)
            assert len(monitor._probe.owners._known) == 3
        assert len(registered) == before
    freed = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert freed() is None  # what runs at exit would hold it
    with watch(model) as monitor:
        for optimizer in optimizers:
            train(model, optimizer, 2)
        known = monitor._probe.owners._known
        del optimizer
        optimizers.clear()
        gc.collect()
        assert known == {}


def test_a_clip_without_a_bound_is_no_clip() -> None:
    """Programs compute the norm by it, to log it; on the fast path too. Once there is a bound, it is one."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    x, y = data()
    monitor = gradwatch.attach(model, report=None, strict=True)
    for step in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.001 if step >= 200 else math.inf)
        optimizer.step()
        if step == 199:
            assert monitor.history.provenance.clipped == "no clip before it seen"
            assert monitor.snapshot().clip_use is None
    monitor.detach()
    assert monitor.history.provenance.clipped == "before the user's clip"
    coefficients = monitor.history.clip_coefficient()
    assert (coefficients[:200] == 1.0).all()
    assert (coefficients[200:] < 1.0).all()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Attribution, "begins"),
        (Inspector, "backward_begins"),
        (Call, "called_from"),
        (Call, "gave"),
        (Attribution, "end"),
        (FastPath, "take"),
        (Buffers, "made"),
        (Buffers, "stepped"),
    ],
)
def test_own_time_counts_all_that_a_quiet_step_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Before and after the forward, the backward and the update."""
    original = getattr(owner, name)
    called: list[str] = []

    def slower(*args: object, **kwargs: object) -> object:
        called.append(name)
        time.sleep(0.02)
        return original(*args, **kwargs)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, forensics=True, clip="norm") as monitor:
        train(model, optimizer, 100)
        then = monitor._probe.seconds
        monkeypatch.setattr(owner, name, slower)
        train(model, optimizer, 10)
    assert called
    assert monitor._probe.seconds - then >= 0.02 * len(called)


def test_own_time_counts_a_row_that_the_end_of_a_backward_makes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a loop that updates the weights by hand."""
    original = StepRecorder.take

    def slower(*args: object, **kwargs: object) -> object:
        time.sleep(0.02)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    model = mlp()
    x, y = data()
    then, rows, began = 0.0, 0, 0.0
    with watch(model) as monitor:
        for step in range(12):
            if step == 6:
                monkeypatch.setattr(StepRecorder, "take", slower)
                then, rows, began = monitor._probe.seconds, monitor.history.rows, time.perf_counter()
            nn.functional.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    assert monitor.history.rows - rows == 6
    assert 6 * 0.02 <= monitor._probe.seconds - then <= time.perf_counter() - began
