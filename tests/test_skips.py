"""A step that is skipped is left out for real, whoever makes it, or it is not called skipped."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradwatch
from gradwatch import device
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from collections.abc import Callable

BAD = 5
TORCHS = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "foreach": True}, {"fused": True}],
    "Adam": [{"weight_decay": 0.1}, {"foreach": True}, {"fused": True}, {"amsgrad": True}],
    "AdamW": [{}, {"foreach": True}, {"fused": True}],
}


class Plain(Optimizer):
    """Takes every gradient for granted."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)
        return loss


class NoneIsZero(Plain):
    """Takes no gradient for a gradient of zero: momentum and decay go on. Counts, in itself, its groups and a list."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = 0
        self.seen: list[float] = []
        self.recent: deque[int] = deque(maxlen=3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = closure() if closure is not None else None
        self.count += 1
        self.recent.append(self.count)
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                state = self.state[parameter]
                state["momentum"] = 0.9 * state.get("momentum", torch.zeros_like(parameter)) + gradient
                state["at"] = self.count
                parameter.sub_(group["lr"] * (state["momentum"] + 0.1 * parameter))
                self.seen.append(float(gradient.norm()))
        return loss


class Twice(NoneIsZero):
    """Evaluates its closure again after a half step, which gives it new gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = super().step(closure)
        closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.001 * torch.nan_to_num(parameter.grad) + 0.001)
        return loss


class Flat(Plain):
    """Keeps parameters and gradients in one buffer each, of which those of the model are views."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        held = self.param_groups[0]["params"]
        self.flat = torch.cat([parameter.detach().flatten() for parameter in held])
        self.gradients = torch.zeros_like(self.flat)
        at = 0
        for parameter in held:
            end = at + parameter.numel()
            parameter.data = self.flat[at:end].view_as(parameter)
            parameter.grad = self.gradients[at:end].view_as(parameter)
            at = end

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = closure() if closure is not None else None
        self.flat.sub_(0.01 * (self.gradients + 0.1 * self.flat))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch."""
        self.gradients.zero_()


class Master(Plain):
    """Steps with copies in double precision, by an optimizer of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.master = [nn.Parameter(p.detach().double()) for p in self.param_groups[0]["params"]]
        self.inner = torch.optim.AdamW(self.master, lr=0.01)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = closure() if closure is not None else None
        for parameter, master in zip(self.param_groups[0]["params"], self.master, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.double()
        self.inner.step()
        for parameter, master in zip(self.param_groups[0]["params"], self.master, strict=True):
            parameter.copy_(master)
        return loss


class Lookahead(Plain):
    """Wraps another, and goes back half of the way every second step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.base = torch.optim.SGD(self.param_groups[0]["params"], lr=0.01, momentum=0.9)
        self.slow = {id(p): p.detach().clone() for p in self.param_groups[0]["params"]}
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = self.base.step(closure)
        self.count += 1
        for parameter in self.param_groups[0]["params"] if self.count % 2 == 0 else ():
            slow = self.slow[id(parameter)]
            slow.add_(0.5 * (parameter - slow))
            parameter.data = slow.clone()
        return loss


class CountsAndLooksAhead(Lookahead):
    """The same, and counts before it lets the other one step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.begun = 1000  # equal numbers of that size are different objects
        self.steps = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        self.begun += 1
        self.steps += 1
        for group in self.param_groups:
            group["begun"] = self.begun
        return super().step(closure)


class Sharp(Plain):
    """Looks for the worst point nearby, evaluates there, comes back and steps (Foret et al. 2021)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.base = torch.optim.SGD(self.param_groups, lr=0.01, momentum=0.9, weight_decay=0.1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter]["old"] = parameter.detach().clone()
                parameter.add_(0.05 * parameter.grad / (parameter.grad.norm() + 1e-12))
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and "old" in self.state[parameter]:
                parameter.data = self.state[parameter]["old"]
        self.base.step()
        return loss


@dataclass
class Moments:
    """What one parameter's update needs."""

    first: Tensor
    count: int = 0


class Noisy(Plain):
    """Draws noise of its own, and keeps its state in objects and arrays."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.generator = torch.Generator().manual_seed(3)
        self.kept: dict[Any, Moments] = {}
        self.norms = np.zeros(4)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = closure() if closure is not None else None
        for parameter in self.param_groups[0]["params"]:
            moments = self.kept.setdefault(parameter, Moments(torch.zeros_like(parameter)))
            moments.count += 1
            moments.first = moments.first + parameter.grad
            self.norms[moments.count % 4] = float(parameter.norm())
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.sub_(0.01 * moments.first / moments.count + 0.001 * noise)
        return loss


class Clears(torch.optim.SGD):
    """One of torch's, made one's own: its step wants gradients, and clears them itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.add_(parameter, alpha=0.01)
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.zero_()
        return loss


class Counts(Plain):
    """Counts its steps before it evaluates its closure, in one of the places where optimizers do; from step ``since`` on."""

    def __init__(self, params: Any, place: str, since: int = 0) -> None:
        super().__init__(params)
        self.place, self.since, self.made = place, since, 0
        self.k = 1000  # equal numbers of that size are different objects
        self.moments = Moments(torch.zeros(1))
        self.array = np.zeros(3)
        self.seen: list[float] = []

    def count(self) -> None:
        """Count."""
        for group in self.param_groups:
            group.setdefault("k", 0)
            group["k"] += self.place == "group"
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("k", 0)
                state.setdefault("step", torch.zeros(()))
                state["k"] += self.place == "state"
                if self.place == "tensor":
                    state["step"] += 1
        self.k += self.place == "attribute"
        self.moments.count += self.place == "object"
        self.array += self.place == "array"
        if self.place == "list":
            self.seen.append(1.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        if self.made >= self.since:
            self.count()
        loss = super().step(closure)
        self.made += 1
        return loss


class CountsAround(torch.optim.SGD):
    """One of torch's, made one's own: counts, then leaves the rest to torch."""

    k = 0

    def step(self, closure: Any = None) -> Any:
        """See torch."""
        self.k += 1
        return super().step(closure)


class SearchesLines(torch.optim.LBFGS):
    """One's own of torch's that searches along lines."""


PLACES = ["attribute", "group", "state", "tensor", "object", "array", "list"]

OWN: dict[str, Callable[[Any], Optimizer]] = {
    kind.__name__: kind for kind in (Plain, NoneIsZero, Flat, Master, Lookahead, CountsAndLooksAhead, Noisy)
}
OWN["Clears"] = lambda params: Clears(params, lr=0.01, momentum=0.9)


def kept(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Return copies of all that a step may move: of the model, the optimizer's state and its other attributes."""

    def plain(thing: Any) -> Any:
        if isinstance(thing, (Tensor, np.ndarray)):
            return torch.as_tensor(thing).detach().clone()
        if isinstance(thing, torch.Generator):
            return thing.get_state()
        if isinstance(thing, Optimizer):
            return plain(thing.state_dict())
        if isinstance(thing, Moments):
            return plain(vars(thing))
        if isinstance(thing, dict):
            return [plain(value) for value in thing.values()]
        return [plain(one) for one in thing] if isinstance(thing, (list, tuple, deque)) else repr(thing)

    own = {
        name: value
        for name, value in vars(optimizer).items()
        if "hook" not in name and name not in ("param_groups", "state", "gradients")
    }
    return [plain(model.state_dict()), plain(optimizer.state_dict()), plain(own)]


def same(one: Any, other: Any) -> bool:
    """True when nothing differs by a bit."""
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return bool(one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes())
    return bool(one == other)


class Run:
    """A short training of which one step's loss is NaN; ``leaves_out``: the user leaves it out, and nobody watches."""

    def __init__(self, make: Callable[[Any], Optimizer], *, closure: bool = False, leaves_out: bool = False) -> None:
        self.model = mlp()
        self.optimizer = make(self.model.parameters())
        self.moved: list[bool] = []
        self.x, self.y = data()
        self._closure = closure
        self._leaves_out = leaves_out

    @torch.enable_grad()
    def _evaluate(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.x), self.y) * (math.nan if step == BAD else 1.0)
        loss.backward()
        return loss

    def train(self, steps: int = 10) -> None:
        """Train."""
        for step in range(steps):
            if step == BAD and self._leaves_out:
                continue
            if self._closure is False or isinstance(self.optimizer, Sharp):
                self._evaluate(step)
            before = kept(self.model, self.optimizer)
            closures: list[Any] = [lambda step=step: self._evaluate(step)] if self._closure else []
            self.optimizer.step(*closures)
            self.moved.append(not same(before, kept(self.model, self.optimizer)))


def check(make: Callable[[Any], Optimizer], *, closure: bool = False) -> gradwatch.Monitor:
    """Train watched and armed: the bad step moves nothing, and the end is that of a training in which nobody made it."""
    watched, plain = (Run(make, closure=closure, leaves_out=leaves) for leaves in (False, True))
    with gradwatch.attach(watched.model, clip="norm", report=None, strict=True) as monitor:
        watched.train()
    plain.train()
    assert [step for step, moved in enumerate(watched.moved) if not moved] == [BAD]
    assert same(kept(watched.model, watched.optimizer), kept(plain.model, plain.optimizer))
    assert monitor.history.skipped().sum() == 1
    assert monitor.notes == []
    return monitor


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (name, settings)
        for name in TORCHS
        if name not in ("LBFGS", "SparseAdam")
        for settings in SETTINGS.get(name, [{}])
    ],
)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_skip_leaves_every_optimizer_of_torch_as_if_nobody_had_stepped(
    name: str, settings: dict[str, Any], hooked: bool
) -> None:
    """To the bit; hooks of the user's own see the gradients that they gave."""
    seen: list[Tensor] = []

    def make(params: Any) -> Optimizer:
        owned = [parameter for parameter in params if name != "Muon" or parameter.dim() == 2]
        optimizer: Optimizer = getattr(torch.optim, name)(owned, lr=0.01, **settings)
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: seen.extend(parameter.grad.norm() for parameter in owned))
            optimizer.register_step_post_hook(lambda *_: seen.extend(parameter.grad.norm() for parameter in owned))
        return optimizer

    check(make)


@pytest.mark.parametrize(
    ("name", "closure"),
    [(name, closure) for name in OWN for closure in (False, True) if not (name == "Clears" and closure)],
)
def test_a_skip_is_real_under_optimizers_of_other_kinds(name: str, closure: bool) -> None:
    """That want gradients, take None for zero, keep flat buffers, masters or other optimizers; to the bit."""
    check(OWN[name], closure=closure)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("closure", [False, True])
def test_what_an_optimizer_counts_before_it_evaluates_is_undone(place: str, closure: bool) -> None:
    """In attributes, groups, state, objects, arrays and lists; whether its class is known already or not."""
    kind = type("Own", (Counts,), {})
    for _ in range(2):
        check(lambda params: kind(params, place), closure=closure)


@pytest.mark.parametrize("first", [0, 1, BAD])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CountsAround, {"momentum": 0.9}),
        (SearchesLines, {}),
        (torch.optim.LBFGS, {}),
        (torch.optim.LBFGS, {"max_iter": 1}),
        (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
        (torch.optim.LBFGS, {"max_iter": 3, "max_eval": 2}),
        (torch.optim.LBFGS, {"tolerance_grad": -1.0}),
    ],
)
def test_evaluations_of_a_step_that_is_left_out_are_not_counted(
    kind: Any, settings: dict[str, Any], first: int
) -> None:
    """Also in the first step of all, which makes the state; or the step is not called skipped."""
    run = Run(lambda params: kind(params, lr=0.01, **settings), closure=True)
    step_with: Any = run.optimizer.step
    with gradwatch.attach(run.model, clip="norm", report=None, strict=True) as monitor:
        for step in range(first):
            step_with(lambda step=step: run._evaluate(step if step != BAD else 0))
        before = kept(run.model, run.optimizer)
        step_with(lambda: run._evaluate(BAD))
        if monitor.history.skipped()[-1]:
            assert same(before, kept(run.model, run.optimizer))
        else:
            assert settings == {"tolerance_grad": -1.0}  # which goes on from a gradient of zero
            assert any("could not be left out" in note for note in monitor.notes)
        assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("place", PLACES[:4])
def test_a_class_that_begins_late_to_count_is_called_skipped_only_where_it_is(place: str) -> None:
    """It counts from the very step on that must be left out: what it does is learned from the steps that could not be."""
    kind = type("Late", (Counts,), {})
    run = Run(lambda params: kind(params, place, since=BAD), closure=True)
    step_with: Any = run.optimizer.step
    with gradwatch.attach(run.model, clip="norm", report=None, strict=True) as monitor:
        for _ in range(BAD):
            step_with(lambda: run._evaluate(0))
        for _ in range(3):
            before = kept(run.model, run.optimizer)
            step_with(lambda: run._evaluate(BAD))
            assert same(before, kept(run.model, run.optimizer)) or not monitor.history.skipped()[-1]
        assert monitor.history.skipped()[-1]
        (note,) = monitor.notes
        assert "the step had changed the optimizer before its gradients were measured" in note


@pytest.mark.parametrize("kind", [Twice, Sharp])
def test_a_skip_is_real_in_the_middle_of_a_step_that_evaluates(kind: Any) -> None:
    """Twice, or only after it has moved: what came before the first evaluation is undone, what comes later is without effect."""
    for _ in range(2):  # the first time the class is not known
        check(kind, closure=True)


@pytest.mark.parametrize("kind", [torch.optim.SGD, *OWN.values()])
def test_gradients_are_as_the_user_left_them_also_when_the_step_raises(kind: Any) -> None:
    """The same tensors with the same numbers, and parameters where they were."""
    made = kind([nn.Parameter(torch.ones(3))])

    class Raises(type(made)):  # type: ignore[misc]
        """As its class, but it gives up in the end."""

        def step(self, closure: Any = None) -> Any:
            """See torch."""
            super().step(closure)
            if self.tired:
                raise RuntimeError("tired")

    run = Run(
        lambda params: (
            Raises(params) if type(made).__init__ is not torch.optim.SGD.__init__ else Raises(params, lr=0.01)
        )
    )
    run.optimizer.tired = False  # type: ignore[attr-defined]
    with gradwatch.attach(run.model, clip="norm", report=None, strict=True):
        run.train(BAD)
        run._evaluate(BAD)
        run.optimizer.tired = True  # type: ignore[attr-defined]
        gradients = [parameter.grad for parameter in run.model.parameters()]
        numbers = [gradient.clone() for gradient in gradients if gradient is not None]
        before = kept(run.model, run.optimizer)
        with pytest.raises(RuntimeError, match="tired") as raised:
            run.optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(run.model.parameters(), gradients, strict=True))
        if not isinstance(run.optimizer, Clears):  # which clears them
            torch.testing.assert_close(
                [p.grad for p in run.model.parameters()], numbers, rtol=0, atol=0, equal_nan=True
            )
        assert same(before, kept(run.model, run.optimizer))
        del raised


class Meddles(Plain):
    """Moves a parameter that it does not hold."""

    other: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See torch."""
        super().step(closure)
        Meddles.other[0].add_(0.01)


class Opaque(Plain):
    """Holds what cannot be copied."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.odd = Uncopied(one=1)


class Uncopied(dict[str, int]):
    """Cannot be copied."""

    def __iter__(self) -> Any:
        raise RuntimeError("no")

    keys = items = values = __iter__


@pytest.mark.parametrize("kind", [Meddles, Opaque])
def test_a_step_that_cannot_be_left_out_is_not_called_skipped(kind: Any) -> None:
    """It is said once, with the reason, and no NaN reaches the weights all the same."""
    run = Run(lambda params: kind(list(params)[1:]))
    Meddles.other = list(run.model.parameters())
    policy = gradwatch.AutoClip("norm", max_skips=3)
    with gradwatch.attach(run.model, clip=policy, report=None, strict=True) as monitor:
        for step in (0, 1, BAD, 2, BAD, BAD, 3):
            run._evaluate(step)
            run.optimizer.step()
        assert not monitor.history.skipped().any()
        assert "0 skipped" in str(monitor.summary())
        assert all(parameter.isfinite().all() for parameter in run.model.parameters())
        (note,) = monitor.notes
        assert note.startswith("a step could not be left out, and is not counted as skipped: ")
        for _ in range(3):
            run._evaluate(BAD)
            run.optimizer.step()
        run._evaluate(BAD)
        with pytest.raises(gradwatch.TrainingUnstableError, match="after 3 steps in a row"):
            run.optimizer.step()


def test_without_an_optimizer_of_torch_no_step_is_called_skipped() -> None:
    """Its gradients are set to zero, and that is said."""
    model = mlp()
    x, y = data()
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(8):
            model.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (math.nan if step == BAD else 1.0)).backward()
            monitor.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad)  # type: ignore[operator]
    assert not monitor.history.skipped().any()
    assert "no optimizer of torch makes the update" in monitor.notes[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# The cap.


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_optimizer_has_its_own_cap(later: bool, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one model, the gradients of one NaN for ever: the finite steps of the other make nothing good."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizers = [torch.optim.SGD(model[place].parameters(), lr=0.01, fused=later) for place in (0, 2)]
    x, y = data()
    policy = gradwatch.AutoClip("norm", max_skips=4)
    stopped = -1
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        try:
            for step in range(40):
                model.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                for parameter in model[0].parameters() if step >= 20 else ():
                    parameter.grad.fill_(math.nan)  # type: ignore[union-attr]
                for place in order:
                    optimizers[place].step()
        except gradwatch.TrainingUnstableError:
            stopped = step
    assert 24 <= stopped <= 25 + later
    assert monitor.history.skipped().sum() == 4


def test_steps_that_surge_are_counted_by_optimizer_too() -> None:
    """The cap of one is reached though the other's steps are well."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    one, other = (torch.optim.SGD(model[place].parameters(), lr=1e-3) for place in (0, 2))
    x, y = data()
    policy = gradwatch.AutoClip("norm", patience=5, escalate=("skip",), max_skips=3)
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        for step in range(100):
            model.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (1e4 if step >= 40 else 1)).backward()
            for parameter in model[2].parameters() if step >= 40 else ():
                parameter.grad.mul_(1e-4)  # type: ignore[union-attr]
            one.step()
            other.step()
    skipped = monitor.history.skipped()
    assert not skipped[1::2].any()
    runs = "".join("s" if hit else "." for hit in skipped[::2]).split(".")
    assert max(map(len, runs)) == 3
