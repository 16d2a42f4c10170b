"""Loops that tempt a monitor into a wrong row, a wrong verdict or a wrong clip."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import device
from tests import terminal
from tests.conftest import left_behind
from tests.trainings import data, mlp, step_in_backward, train, true_norms


def watch(model: nn.Module, **settings: Any) -> gradwatch.Monitor:
    """Attach silently and strictly."""
    return gradwatch.attach(model, report=None, strict=True, **settings)


def test_accumulation_over_many_batches_is_no_loop_without_an_optimizer() -> None:
    """Sixty-four backwards, one step, one row; nothing is clipped before it."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, clip=gradwatch.AutoClip("norm", when="always")) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(64):
                nn.functional.mse_loss(model(x), 10 * y).backward()
            truth = true_norms(model)
            optimizer.step()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
    assert monitor.history.rows == 2


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_a_step_that_the_user_leaves_out_does_not_spoil_the_next_row(*, to_none: bool, clips: bool) -> None:
    """The usual guard against NaN: no incident, no skipped good step, the right loss."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, clip="norm") as monitor:
        for step in range(30):
            optimizer.zero_grad(set_to_none=to_none)
            loss = nn.functional.mse_loss(model(x * (math.nan if step == 20 else 1)), y)
            loss.backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            if not loss.isfinite():
                continue
            optimizer.step()
            assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item())
    assert monitor.incidents == []
    assert monitor.history.rows == 29


def test_two_optimizers_on_one_model_leave_a_row_each() -> None:
    """Each with its own layers, the shared loss, and norms before the one clip over the whole model."""
    x, y = data()
    model = mlp()
    body, head = list(model.parameters())[:4], list(model.parameters())[4:]
    one, other = torch.optim.SGD(body, lr=0.01), torch.optim.Adam(head, lr=1e-3)
    with watch(model) as monitor:
        for _ in range(80):
            model.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            truth = true_norms(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            one.step()
            other.step()
            first, second = monitor.history.grad_norm(last=2)
            np.testing.assert_allclose(first, [*truth[:4], math.nan, math.nan], rtol=1e-6)
            np.testing.assert_allclose(second, [*[math.nan] * 4, *truth[4:]], rtol=1e-6)
            np.testing.assert_allclose(monitor.history.loss(last=2), [loss.item()] * 2, rtol=1e-6)
            assert monitor.history.provenance.clipped == "before the user's clip"
    assert monitor.incidents == []
    assert not np.isnan(monitor.history.dead_share[[0, 2, 4]]).any()


def test_every_counts_the_steps_of_each_optimizer() -> None:
    """With two optimizers and `every=2` both are seen."""
    x, y = data()
    model = mlp()
    optimizers = [
        torch.optim.SGD(part, lr=0.01) for part in (list(model.parameters())[:4], list(model.parameters())[4:])
    ]
    with watch(model, every=2) as monitor:
        for _ in range(6):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert (~np.isnan(monitor.history.grad_norm())).sum(axis=0).tolist() == [3] * 6


def test_parts_that_take_turns_lose_no_loss_and_are_not_dead() -> None:
    """Two heads used alternately, with gradients set to zero instead of None."""
    trunk, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
    model = nn.ModuleList([trunk, heads])
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        for step in range(150):
            optimizer.zero_grad(set_to_none=False)
            nn.functional.mse_loss(heads[step % 2](torch.tanh(trunk(x))), y).backward()
            optimizer.step()
    assert not np.isnan(monitor.history.loss()).any()
    assert monitor.incidents == []


def test_layers_frozen_one_after_the_other_lose_no_loss() -> None:
    """The last layer first, whose gradient comes first; then a half of the model at once, and free again."""
    model = mlp(depth=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with watch(model) as monitor:
        losses += train(model, optimizer, 70)
        for place in (6, 4, 2):
            model[place].requires_grad_(False)
            losses += train(model, optimizer, 20, seed=place)
        model.requires_grad_(True)
        model[:4].requires_grad_(False)
        losses += train(model, optimizer, 20, seed=9)
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_head_that_comes_into_use_later_brings_its_own_loss(*, to_none: bool) -> None:
    """One head for some steps, then two by turns, each with its own loss; the user clips."""
    trunk, heads = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
    model = nn.ModuleList([trunk, heads])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    with watch(model) as monitor:
        for step in range(120):
            head = 0 if step < 3 else step % 2
            optimizer.zero_grad(set_to_none=to_none)
            loss = nn.functional.mse_loss(heads[head](trunk(x)), y if head == 0 else 5 - 3 * y)
            loss.backward()
            truth = true_norms(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item())
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)


def test_stochastic_depth_and_a_clip_of_the_users_go_together() -> None:
    """A block that is left out now and then has no norm in that row; the norms of the others are those before the clip."""
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    with watch(model, clip="norm") as monitor:
        for step in range(150):
            hidden = x
            for block in model[:3] if step >= 75 and step % 10 == 5 else model:
                hidden = hidden + torch.tanh(block(hidden))
            optimizer.zero_grad()
            nn.functional.mse_loss(hidden.mean(1, keepdim=True), y).backward()
            truth = true_norms(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
    assert monitor.history.rows == 150


def test_an_explosion_of_gradients_made_by_hand_is_seen_before_the_users_clip() -> None:
    """No backward runs that could be heard: the norms are those of the gradients that are clipped and stepped with."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = data()
    held, truth = list(model.parameters()), []
    with watch(model) as monitor:
        for step in range(120):
            loss = nn.functional.mse_loss(model(x), y) * (1 if step < 100 else 1e6)
            for parameter, gradient in zip(held, torch.autograd.grad(loss, held), strict=True):
                parameter.grad = gradient
            truth.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            if step % 7 == 3:  # left out
                truth.pop()
                continue
            optimizer.step()
    np.testing.assert_allclose(monitor.history.global_norm(), truth, rtol=1e-5)
    assert np.isnan(monitor.history.loss()).all()


def test_a_middle_layer_replaced_in_its_old_place_is_followed() -> None:
    """In the model and in the same optimizer: its norm is the new layer's, and a step with NaN of it is skipped."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, clip="norm") as monitor:
        train(model, optimizer, 70)
        held, old = optimizer.param_groups[0]["params"], list(model[2].parameters())
        model[2] = nn.Linear(16, 16)
        for before, after in zip(old, model[2].parameters(), strict=True):
            held[next(place for place, one in enumerate(held) if one is before)] = after
        for bad in (False, True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if bad:
                model[2].weight.grad.fill_(math.nan)  # type: ignore[operator, union-attr]
            else:
                truth = true_norms(model)
            optimizer.step()
            if not bad:
                np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("replaced", [(), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("steps", [(30, 60, 90), (60, 61)], ids=str)
def test_each_new_optimizer_has_the_norm_before_the_users_clip_in_its_first_row(
    replaced: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    """Whether layers are replaced with it or not, the second and third time as well."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    truth = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(100):
            if step in steps:
                for place in replaced:
                    model[place] = nn.Linear(8 if place == 0 else 4, 4 if place == 0 else 1)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            truth.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
            optimizer.step()
    np.testing.assert_allclose(monitor.history.global_norm(), truth, rtol=1e-5)


def test_a_scalar_parameter_replaced_by_an_equal_one_is_followed() -> None:
    """Two tensors of one element can be equal without being the same."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(8, 4), nn.Parameter(torch.ones(1)), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x) * self.scale)
            return out

    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model) as monitor:
        train(model, optimizer, 70)
        held = optimizer.param_groups[0]["params"]
        place = next(place for place, one in enumerate(held) if one is model.scale)
        model.scale = held[place] = nn.Parameter(torch.ones(1))
        truth: list[list[float]] = []
        train(model, optimizer, 3, each=lambda _: truth.append(true_norms(model)))
        order = [list(monitor.history.layers).index(name) for name, _ in model.named_parameters()]
        np.testing.assert_allclose(monitor.history.grad_norm(last=3)[:, order], truth, rtol=1e-6)


def test_a_new_head_is_measured_before_the_users_clip_from_its_first_step_on() -> None:
    """It is looked for when the user clips gradients that are none of the model's known layers."""
    x, y = data()
    model = mlp()
    with watch(model) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 70)
        model.append(nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            truth = true_norms(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)


def test_an_optimizer_that_holds_its_layers_in_another_order_is_measured_right() -> None:
    """On the short way as on the long one."""
    model = mlp()
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=0.01)
    truth: list[list[float]] = []
    with watch(model) as monitor:
        train(model, optimizer, 100, each=lambda _: truth.append(true_norms(model)))
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_loss_that_is_changed_in_place_after_its_backward_is_recorded_as_it_was(*, accumulates: bool) -> None:
    """As a report of the mean loss does it."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        for _ in range(70):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(1 + accumulates):
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                total += loss.item()
                with torch.no_grad():
                    loss.detach().mul_(100)
            optimizer.step()
            assert monitor.history.loss(last=1)[0] == pytest.approx(total)


def test_losses_on_two_devices_do_not_disturb_the_training() -> None:
    """What cannot be added up is not known."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            elsewhere = torch.ones((), device="meta", requires_grad=True) * 2  # stands for a second accelerator
            torch.autograd.backward([nn.functional.mse_loss(model(x), y), elsewhere])
            optimizer.step()
    assert monitor.history.rows == 3
    assert np.isnan(monitor.history.loss()).all()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("steps", [5, 100])
def test_no_gradient_lives_longer_for_being_watched(
    *, later: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a clip of the user's, a step and `zero_grad`, on the short way and on the long one."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, clip="norm"):
        for step in range(steps):
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            alive = [weakref.ref(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
            if step < steps - 1:
                optimizer.step()
            optimizer.zero_grad()
            assert not [ref for ref in alive if ref() is not None]


def test_a_step_left_out_on_a_device_does_not_add_its_loss_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients set to zero in place are told from accumulated ones without reading them."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with watch(model) as monitor:
        for step in range(30):
            optimizer.zero_grad(set_to_none=False)
            total = 0.0
            for _ in range(1 + step % 3):
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                total += loss.item()
            if step % 5 == 2:
                continue
            optimizer.step()
            losses.append(total)
    np.testing.assert_allclose(monitor.history.loss(), losses, rtol=1e-6)


def test_a_wrapper_that_changes_the_gradients_is_seen_through() -> None:
    """An optimizer around another one: the row is of the gradients that the one inside steps with, if it steps."""

    class Accumulating(torch.optim.Optimizer):
        """Steps at every third call, with a third of the gradients."""

        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base, self.calls = base, 0
            super().__init__(base.param_groups, {})

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls % 3 == 0:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.grad.div_(3)
                self.base.step()
                self.base.zero_grad()
            return None

        def zero_grad(self, set_to_none: bool = True) -> None:
            pass

    model = mlp()
    optimizer = Accumulating(torch.optim.SGD(model.parameters(), lr=0.01))
    truth: list[list[float]] = []
    with watch(model) as monitor:
        losses = train(model, optimizer, 12, each=lambda _: truth.append(true_norms(model)))
    np.testing.assert_allclose(monitor.history.grad_norm(), np.array(truth[2::3]) / 3, rtol=1e-6)
    np.testing.assert_allclose(monitor.history.loss(), np.array(losses).reshape(-1, 3).sum(1), rtol=1e-6)


def test_an_optimizer_that_holds_another_one_and_never_steps_it_makes_the_rows_itself() -> None:
    """After some steps in which it was waited for."""

    class Holding(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.01)
            self.other = torch.optim.SGD(self.param_groups[0]["params"], lr=0.01)

    model = mlp()
    optimizer = Holding(model.parameters())
    with watch(model) as monitor:
        losses = train(model, optimizer, 40)
    assert monitor.history.rows > 20
    np.testing.assert_allclose(monitor.history.loss(), losses[-monitor.history.rows :], rtol=1e-6)


def test_a_backward_on_another_thread_inside_a_backward_is_part_of_it() -> None:
    """As reentrant checkpointing runs it on a device: the loss is that of the outer one, the order that of the whole."""

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, part: nn.Module) -> Tensor:
            ctx.part, ctx.x = part, x.detach()
            return part(x).detach()  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            x = ctx.x.requires_grad_()
            with torch.enable_grad():
                out = ctx.part(x)
            thread = threading.Thread(target=torch.autograd.backward, args=(out, gradient))
            thread.start()
            thread.join()
            return x.grad, None

    model = mlp(depth=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    with watch(model) as monitor:
        for _ in range(8):
            optimizer.zero_grad()
            hidden = x.clone().requires_grad_()
            for part in list(model)[:6]:
                hidden = Inside.apply(hidden, part)  # type: ignore[no-untyped-call]
            loss = nn.functional.mse_loss(model[6](hidden), y)
            loss.backward()
            truth = true_norms(model)
            optimizer.step()
            assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item())
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
        order = monitor._probe.gradient_hooks.order
    assert order is not None
    assert order.tolist() == sorted(order.tolist(), reverse=True) or order[0] > order[-1]


LISTENING = [
    ("attribution", "end"),
    ("gradient_hooks", "failed"),
    ("gradient_hooks", "end"),
    ("owners", "get"),
    ("owners", "stepping"),
    ("owners", "known"),
    ("owners", "current"),
    ("losses", "read"),
    ("recorder", "measure_before_clip"),
    ("recorder", "take"),
    ("", "user_clips"),
    ("", "user_norms"),
    ("", "user_scales"),
    ("", "user_clips_nothing"),
    ("", "scaler_unscales"),
    ("", "scaler_steps"),
    ("", "scaler_stepped"),
    ("", "backward_begins"),
    ("", "backward_failed"),
    ("", "backward_ended"),
    ("", "before_step"),
    ("", "after_step"),
]


@pytest.mark.parametrize("at", [1, 70])
@pytest.mark.parametrize(("part", "name"), LISTENING, ids=str)
def test_a_failure_of_one_monitor_reaches_neither_the_loop_nor_another_monitor(
    part: str, name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever gradwatch is called from torch; it is told once, and the other monitor's rows are whole."""
    x, y = data()
    model, other = mlp(), mlp(seed=1)
    broken, whole = gradwatch.attach(model, report=None), watch(other)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler("cpu")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("broken")

    for step in range(at + 6):
        if step == at:
            monkeypatch.setattr(getattr(broken._probe, part) if part else broken._probe, name, fail)
        optimizer.zero_grad()
        if step == at + 1:  # where there is nothing to clip
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == at + 2:
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.zeros(1).backward()
        loss = nn.functional.mse_loss(model(x), y) + nn.functional.mse_loss(other(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([*model.parameters(), *other.parameters()], 1.0)
        scaler.step(optimizer)
        scaler.update()
    broken.detach()
    whole.detach()
    told = sum("OSError: broken" in note for note in broken.notes)
    assert told == 1 or (told == 0 and at == 70 and name in {"end", "take", "read"})  # not called on the short way
    assert whole.history.rows == at + 6


def test_a_scaler_that_never_recovers_is_an_incident() -> None:
    """Left-out steps leave no rows, until there are ten in a row."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model) as monitor:
        for step in range(60):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x * (math.nan if step >= 20 else 1)), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if step == 25:
                assert monitor.incidents == []
    assert monitor.incidents[0].kind == "nonfinite"
    assert monitor.history.provenance.source == "left out by the scaler"


def test_a_loss_without_a_scaler_is_not_divided_by_the_last_ones_scale() -> None:
    """Half of a training under AMP, half without."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model) as monitor:
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        assert monitor.history.loss(last=1)[0] == pytest.approx(loss.item())


def test_a_skipped_step_is_skipped_for_parameters_of_other_models_too() -> None:
    """One optimizer over two models, one of them watched: the step happens for both or for none."""
    watched, other = mlp(), mlp(seed=1)
    optimizer = torch.optim.AdamW([*watched.parameters(), *other.parameters()], lr=0.01)
    x, y = data()
    with watch(watched, clip="norm"):
        for bad in (False, True):
            optimizer.zero_grad()
            before = [parameter.detach().clone() for parameter in other.parameters()]
            (nn.functional.mse_loss(watched(x * (math.nan if bad else 1)), y) + other(x).square().mean()).backward()
            optimizer.step()
            same = [torch.equal(b, p.detach()) for b, p in zip(before, other.parameters(), strict=True)]
            assert all(same) is bad


def test_gradients_that_the_user_has_mended_are_not_skipped() -> None:
    """The row tells of the NaN before the clip; the step happens, because the optimizer gets finite gradients."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, clip="norm") as monitor:
        for bad in (False, True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * (math.nan if bad else 1)), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.nan_to_num_(0.0)
            optimizer.step()
    assert monitor.incidents[0].kind == "nonfinite"
    assert not monitor.history.skipped().any()


def test_a_step_after_the_stop_is_judged_again() -> None:
    """Catching `TrainingUnstableError` and stepping on does not write NaN into the weights."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, clip=gradwatch.AutoClip("norm", on_nonfinite="stop")):
        nn.functional.mse_loss(model(x * math.nan), y).backward()
        for _ in range(2):
            with pytest.raises(gradwatch.TrainingUnstableError, match='on_nonfinite="stop"'):
                optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_resumed_healthy_run_stays_healthy() -> None:
    """Resumed between two samples of the weights, with clip armed: no incident, no clip, frozen layers still seen."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with watch(model) as monitor:
        train(model, optimizer, 100)
    with watch(model, clip="norm") as resumed:
        resumed.load_state_dict(monitor.state_dict())
        train(model, optimizer, 100, seed=1)
    assert resumed.incidents == []
    assert resumed.history.losses == 200
    optimizer.param_groups[0]["lr"] = 0.0
    with watch(model) as frozen:
        frozen.load_state_dict(resumed.state_dict())
        train(model, optimizer, 130)
    assert "frozen" in {incident.kind for incident in frozen.incidents}


def test_no_rules_at_all_only_records() -> None:
    """An empty list is a choice."""
    model = mlp()
    with watch(model, rules=[]) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    assert "healthy: 3 steps" in str(monitor.summary())


def test_a_report_that_fails_to_start_leaves_nothing_attached_when_strict() -> None:
    """The error comes out of `attach`, and nothing stays."""

    class NoStart(gradwatch.Report):
        def start(self) -> None:
            raise OSError("no screen")

    model = mlp()
    with pytest.raises(OSError, match="no screen"):
        gradwatch.attach(model, report=NoStart(), strict=True)
    assert left_behind() == []


def test_a_spike_switches_auto_clip_on_where_it_is_named() -> None:
    """A spike is a notice; asking for it by name is enough."""
    assert gradwatch.AutoClip("norm", when="spike").severity == "notice"
    assert gradwatch.AutoClip("norm").severity == "warning"


def test_each_report_has_its_own_period() -> None:
    """A slow one is not called as often as a quick one."""

    class Count(gradwatch.Report):
        calls = 0

        def step(self, snapshot: gradwatch.Snapshot) -> None:
            self.calls += 1

        def close(self, snapshot: gradwatch.Snapshot) -> None:
            pass

    class Quick(Count):
        period: ClassVar[float] = 0.0

    class Slow(Count):
        period: ClassVar[float] = 60.0

    model, quick, slow = mlp(), Quick(), Slow()
    with gradwatch.attach(model, report=[quick, slow], strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 30)
    assert (quick.calls, slow.calls) == (30, 1)


def test_two_live_monitors_share_a_terminal() -> None:
    """The first draws, the second writes lines above it; prints come through, both summaries appear, nothing hangs."""
    session = terminal.run(
        "import torch, gradwatch\n"
        "from tests.trainings import mlp, train\n"
        "one, other = mlp(), mlp(seed=1)\n"
        "first = gradwatch.attach(one, report='live'); second = gradwatch.attach(other, report='live')\n"
        "for model in (one, other):\n"
        "    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 40)\n"
        "    print('hello')\n"
        "first.detach(); second.detach()\n"
        "print('end')\n"
    )
    assert session.code == 0
    assert session.everything.count("hello") == 2
    assert session.everything.count("gradwatch healthy: 40 steps") == 2
    assert session.everything.rstrip().endswith("end")


def test_another_librarys_global_hook_survives_a_failing_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch walks over its hooks while the monitor switches itself off."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    monkeypatch.setattr("gradwatch.probe.gradients.global_norm_of", lambda _: 1 / 0)
    calls: list[int] = []
    model = mlp()
    monitor = gradwatch.attach(model, report=None)
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    handle.remove()
    monitor.detach()
    assert len(calls) == 3


def test_warnings_as_errors_meet_none_of_gradwatchs() -> None:
    """NaN, Inf, zeros and empty parameters pass without a word from numpy."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.scalar = nn.Parameter(torch.tensor(1.0))
            self.zero = nn.Parameter(torch.zeros(4, 4))
            self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = (x * self.scalar).sum() + (0 * self.zero).sum() + self.wide.sum() + self.empty.sum()
            return total

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model) as monitor:
        for step in range(100):
            optimizer.zero_grad()
            model(torch.full((2,), [1.0, 0.0, math.inf, math.nan][step % 4 if step > 70 else 0])).backward()
            optimizer.step()
        str(monitor.summary())
    assert monitor.history.rows == 100


def test_quantised_parameters_are_left_alone() -> None:
    """A frozen integer parameter has no gradient and no norm."""
    model = mlp()
    model.register_parameter("quantised", nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False))
    with watch(model) as monitor:
        train(model, torch.optim.SGD(list(model.parameters())[1:], lr=0.01), 3)
    assert "quantised" not in monitor.history.layers
    assert monitor.history.rows == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, from inside dynamo
def test_a_compiled_optimizer_step_is_measured() -> None:
    """Dynamo does not trace into the monitor."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = torch.compile(optimizer.step, backend="eager")
    x, y = data()
    with watch(model) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            truth = true_norms(model)
            step()
            np.testing.assert_allclose(monitor.history.grad_norm(last=1)[0], truth, rtol=1e-6)
    assert monitor.history.rows == 4


def test_trainings_in_threads_keep_their_own_losses() -> None:
    """Three models, three threads, three monitors: each row holds its own loss."""
    models = [mlp(seed=seed) for seed in range(3)]
    monitors = [watch(model) for model in models]
    losses: dict[int, list[float]] = {}

    def work(number: int) -> None:
        optimizer = torch.optim.SGD(models[number].parameters(), lr=0.01)
        losses[number] = train(models[number], optimizer, 60, seed=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, monitor in enumerate(monitors):
        monitor.detach()
        np.testing.assert_allclose(monitor.history.loss(), losses[number], rtol=1e-6)


def test_an_optimizer_that_wraps_another_makes_one_row_a_step() -> None:
    """A Lookahead-like wrapper: both are optimizers of torch over the same parameters."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base = base
            super().__init__([parameter for group in base.param_groups for parameter in group["params"]], {"lr": 0.01})

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    model = mlp()
    with watch(model) as monitor:
        train(model, Wrapper(torch.optim.SGD(model.parameters(), lr=0.01)), 5)
    assert monitor.history.rows == 5


def test_losses_of_several_roots_and_several_calls_add_up() -> None:
    """As the gradients do."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model) as monitor:
        loss = nn.functional.mse_loss(model(x), y)
        torch.autograd.backward([loss, 2 * loss])
        optimizer.step()
        assert monitor.history.loss(last=1)[0] == pytest.approx(3 * loss.item())
        for part in range(2):
            monitor.loss(np.float32(part + 1))
        optimizer.step()
        assert monitor.history.loss(last=1)[0] == 3.0


def test_auto_clip_and_measuring_each_nth_step_exclude_each_other() -> None:
    """A step that is not measured could not be saved."""
    model = mlp()
    with pytest.raises(gradwatch.UsageError, match="every=10 together with clip='norm'"):
        watch(model, every=10, clip="norm")


def test_parameters_that_come_after_attach_are_watched() -> None:
    """A replaced head keeps its columns; the loss of its first backward is not lost."""
    model = mlp()
    with watch(model) as monitor:
        model[4] = nn.Linear(16, 1)
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 2)
    assert len(monitor.history.layers) == 6
    assert (monitor.history.grad_norm() > 0).all()
    assert not np.isnan(monitor.history.loss()).any()
    assert monitor.notes == []


@pytest.mark.parametrize("state", [None, {}, {"step": 3}, {"step": 3, "history": {}}])
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    """With what was expected."""
    model = mlp()
    with watch(model) as monitor, pytest.raises(gradwatch.UsageError, match="expected"):
        monitor.load_state_dict(state)


def test_a_rule_without_its_form_is_refused() -> None:
    """A missing code or a sign that does not exist."""

    class Formless(gradwatch.Rule):
        """No code."""

    class Misspelt(gradwatch.rules.LossJump):
        """A wrong sign."""

        sign: ClassVar[Any] = "sutble"

    model = mlp()
    with pytest.raises(gradwatch.UsageError, match="Formless has code=None; expected text"):
        watch(model, rules=[Formless()])
    with pytest.raises(gradwatch.UsageError, match="sign='sutble'; expected one of 'subtle'"):
        watch(model, rules=[Misspelt()])


def test_another_live_display_of_rich_does_not_recurse() -> None:
    """A user's own `rich.live.Live` around the loop, with prints."""
    session = terminal.run(
        "import time, torch, gradwatch\n"
        "from rich.live import Live\n"
        "from tests.trainings import mlp, train\n"
        "model = mlp()\n"
        "gradwatch.attach(model)\n"
        "with Live('theirs', refresh_per_second=10):\n"
        "    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 60, each=lambda _: time.sleep(0.01))\n"
        "    print('hello')\n"
    )
    assert session.code == 0
    assert "RecursionError" not in session.raw
    assert "hello" in session.everything
    assert "60 steps of Sequential" in session.everything


@pytest.mark.parametrize("later", [False, True])
def test_layers_that_learn_later_are_not_called_frozen(*, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfrozen at step 100; and a head that is replaced by one of another shape while units are counted."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    x, y = data()
    model = mlp()
    model[0].requires_grad_(False)
    with watch(model) as monitor:
        train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), 100)
        model[0].requires_grad_(True)
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 40)
        model[4] = nn.Linear(16, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).mean(1, keepdim=True), y).backward()
            optimizer.step()
    assert monitor.history.rows == 290
    assert not [incident for incident in monitor.incidents if incident.kind == "frozen"]


def test_parameters_swapped_inside_an_optimizer_are_followed() -> None:
    """As a wrapper does it that shards the model after the optimizer was made."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, optimizer=optimizer, report=None, strict=True) as monitor:
        model.load_state_dict(model.state_dict(), assign=True)
        for name in list(dict(model.named_parameters())):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(model.get_parameter(name).detach().clone()))
        optimizer.param_groups[0]["params"][:] = list(model.parameters())
        truth: list[list[float]] = []
        train(model, optimizer, 5, each=lambda _: truth.append(true_norms(model)))
    np.testing.assert_allclose(monitor.history.grad_norm(), truth, rtol=1e-6)


def test_a_failure_around_a_scalers_step_never_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and training goes on."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    x, y = data()
    with gradwatch.attach(model, report=None) as monitor:
        monkeypatch.setattr(monitor._probe.owners, "find", None)
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
    assert "TypeError" in monitor.notes[0]


def test_a_loss_scale_that_was_halved_to_nothing_leaves_no_loss() -> None:
    """Zero times the loss is zero: that is not the loss."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e-45, backoff_factor=0.1, growth_interval=10**6)
    x, y = data()
    with watch(model) as monitor:
        for step in range(20):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y) * (float("inf") if step < 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 0
    assert np.isnan(monitor.history.loss()[-1])
    assert monitor.incidents[-1].kind == "nonfinite"


def test_an_optimizer_inside_backward_takes_in_a_new_head() -> None:
    """Parts of one backward from before and after it join into rows of the new width."""
    model = mlp()
    step_in_backward(model)
    x, y = data()
    with watch(model) as monitor:
        nn.functional.mse_loss(model(x), y).backward()
        model.append(nn.Linear(1, 1))
        step_in_backward(model[5])
        for _ in range(4):
            nn.functional.mse_loss(model(x), y).backward()
    assert monitor.history.layers[-2:] == ("5.weight", "5.bias")
    assert monitor.history.rows == 5
    assert (monitor.history.grad_norm(last=3) > 0).all()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_what_a_distributed_checkpoint_does_to_an_optimizer_without_state_is_no_step(
    kind: type[torch.optim.SGD] | type[torch.optim.Adam],
) -> None:
    """It steps with gradients and rates of zero, before it saves and before it loads."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = mlp()
    optimizer = kind(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 20)
        optimizer.zero_grad()
        saved: Any = get_optimizer_state_dict(model, optimizer)
        resumed = kind(model.parameters(), lr=0.01)
        set_optimizer_state_dict(model, resumed, saved)
        losses = train(model, resumed, 20)
        resumed.zero_grad()
        resumed.step(closure=None)  # a step like another, although it has nothing to do
    assert monitor.history.loss()[20:40] == pytest.approx(losses)
    assert monitor.history.rows <= 41
    assert not monitor.incidents


def test_a_clip_whose_norm_overflows_leaves_nothing_and_says_so() -> None:
    """Torch divides by infinity then, so the gradients that the optimizer gets are zero."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for factor in (1.0, 1.0, 1e22):
            optimizer.zero_grad()
            (factor * nn.functional.mse_loss(model(x), y)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert all(one.grad is not None and not one.grad.any() for one in model.parameters())
    assert 1e20 < monitor.history.global_norm()[-1] < np.inf
    assert monitor.history.clip_coefficient()[-1] == 0.0
