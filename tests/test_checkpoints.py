"""Buffers go back with a step that is skipped, and a model that is not finite is not called well."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import device
from tests.torchrun import played
from tests.trainings import data

if TYPE_CHECKING:
    from collections.abc import Callable

BAD = 7
WIDE = gradwatch.AutoClip(gradwatch.ClipNorm(1e9))  # it never clips, but it skips


class Averages(nn.Module):
    """Buffers of many kinds, each changed by every forward in training."""

    def __init__(self, late: bool = True) -> None:
        super().__init__()
        self.has_late = late
        self.register_buffer("in_place", torch.zeros(8))
        self.register_buffer("by_data", torch.zeros(8))
        self.register_buffer("replaced", torch.zeros(8), persistent=False)
        self.register_buffer("late", None)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("table", torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.late: Tensor | None
        self.in_place: Tensor
        self.by_data: Tensor
        self.replaced: Tensor
        self.pointer: Tensor
        self.table: Tensor
        self.mean: Tensor
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        if self.training:
            with torch.no_grad():
                self.in_place.mul_(0.9).add_(x.mean(0))
                self.by_data.data.mul_(0.9).add_(x.mean(0))
                self.replaced = 0.9 * self.replaced + x.mean(0)
                if self.has_late:
                    self.late = x.mean(0) if self.late is None else 0.9 * self.late + x.mean(0)
                self.pointer += 1
                self.table.add_(x.mean())
                nn.functional.batch_norm(x, self.mean, self.var, training=True)
        return x


def normalised(late: bool = True) -> nn.Sequential:
    """Return a model that keeps running statistics in three ways, in one module twice."""
    torch.manual_seed(0)
    twice = nn.BatchNorm1d(16)
    return nn.Sequential(
        Averages(late),
        nn.Linear(8, 16),
        twice,
        nn.ReLU(),
        nn.Linear(16, 16),
        twice,
        nn.SyncBatchNorm(16).eval(),
        nn.Linear(16, 1),
    )


def frozen(model: nn.Module) -> nn.Module:
    """Leave the synchronised one, which has no training on the CPU, as it is."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()
    return model


def buffers(model: nn.Module) -> dict[str, Any]:
    """Return copies of all buffers."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def trained(
    armed: bool, *, fused: bool = False, forwards: int = 1, bad: frozenset[int] = frozenset({BAD}), late: bool = True
) -> tuple[nn.Module, gradwatch.Monitor | None]:
    """Train; bad batches hold NaN. Unarmed, nobody watches and the user leaves out the bad steps, forwards and all."""
    model = frozen(normalised(late))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    x, y = data()
    monitor = gradwatch.attach(model, clip=WIDE, report=None, strict=True) if armed else None
    for step in range(40):
        if step in bad and not armed:
            continue
        optimizer.zero_grad()
        for part in range(forwards):
            batch = x[part::forwards] * (math.nan if step in bad and part == forwards - 1 else 1.0)
            nn.functional.mse_loss(model(batch), y[part::forwards]).backward()
        optimizer.step()
    if monitor is not None:
        monitor.detach()
    return model, monitor


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize("bad", [{BAD}, {0}, {1, 2, 30, 31}], ids=str)
def test_a_skip_gives_back_every_buffer_that_its_forwards_changed(
    later: bool, forwards: int, bad: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is that of a training in which nobody ran the bad batch, to the bit.

    On a device it cannot be known in time that nobody else wrote to what is no normalisation's: there it is not claimed.
    """
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    late = not (later and 0 in bad)  # a buffer that comes with the bad batch cannot be unmade where nothing is read
    watched, monitor = trained(armed=True, fused=later, forwards=forwards, bad=frozenset(bad), late=late)
    plain, _ = trained(armed=False, fused=later, forwards=forwards, bad=frozenset(bad), late=late)
    assert monitor is not None
    assert [note.partition(":")[0] for note in monitor.notes] == [
        "a step could not be left out, and is not counted as skipped"
    ] * later
    assert np.flatnonzero(monitor.history.skipped()).tolist() == ([] if later else sorted(bad))
    torch.testing.assert_close(buffers(watched), buffers(plain), rtol=0, atol=0)
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


def _target_after_step(model: nn.Module) -> None:
    model.get_buffer("target").copy_(model.get_parameter("0.weight"))


def _average_after_step(model: nn.Module) -> None:
    model.get_buffer("target").lerp_(model.get_parameter("0.weight"), 0.1)


def _replaced_after_step(model: nn.Module) -> None:
    model.register_buffer("target", model.get_parameter("0.weight").detach().clone())


def _statistics_after_step(model: nn.Module) -> None:
    model.get_buffer("1.running_mean").mul_(0.5)


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
@pytest.mark.parametrize(
    "write", [_target_after_step, _average_after_step, _replaced_after_step, _statistics_after_step]
)
def test_what_the_program_wrote_since_the_last_step_is_not_taken_back_unsaid(
    write: Callable[[nn.Module], None], later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target network, an average, a tensor in another's place: they stay, and where they may not, no skip is claimed."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.register_buffer("target", model.get_parameter("0.weight").detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    x, y = data()
    with gradwatch.attach(model, clip=WIDE, report=None, strict=True) as monitor:
        for step in range(30):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * (math.nan if step == 20 else 1.0)), y).backward()
            before = model.get_buffer("target").clone()
            optimizer.step()
            assert torch.equal(model.get_buffer("target"), before)
            with torch.no_grad():
                write(model)
    assert not monitor.history.skipped().any()
    assert "by the program" in " ".join(monitor.notes) or "the program wrote" in " ".join(monitor.notes)
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
def test_buffers_stay_the_tensors_that_they_are_and_steps_that_are_made_change_nothing(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched and armed, without a bad step: bit-identical, the same objects, and graphs that were kept still run back."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)

    def run(armed: bool) -> tuple[dict[str, Any], list[int], list[int]]:
        model = frozen(normalised())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=later)
        x, y = data()
        monitor = gradwatch.attach(model, clip=WIDE, report=None, strict=True) if armed else None
        before = [id(buffer) for name, buffer in model.named_buffers() if name not in ("0.replaced", "0.late")]
        for _ in range(70):
            optimizer.zero_grad()
            table = (model.get_buffer("0.table") * model.get_parameter("1.weight").mean()).mean().square()
            nn.functional.mse_loss(model(x), y).backward(retain_graph=True)
            optimizer.step()
            nn.functional.mse_loss(model(x), y).detach()
            del table
        after = [id(buffer) for name, buffer in model.named_buffers() if name not in ("0.replaced", "0.late")]
        if monitor is not None:
            monitor.detach()
        return {**buffers(model), **model.state_dict()}, before, after

    (armed, before, after), (plain, _, _) = run(armed=True), run(armed=False)
    assert before == after
    torch.testing.assert_close(armed, plain, rtol=0, atol=0)


def test_the_forwards_of_each_optimizers_step_are_its_own() -> None:
    """Two by turns, a bad batch in the steps of one: the other's statistics are those of a training without that batch."""

    def run(armed: bool) -> tuple[dict[str, Any], list[bool]]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 1)])
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in model]
        x, y = data()
        monitor = gradwatch.attach(model, clip=WIDE, report=None, strict=True) if armed else None
        for step in range(20):
            for turn, optimizer in enumerate(optimizers):
                bad = step == BAD and turn == 1
                if bad and not armed:
                    continue
                model.zero_grad()
                nn.functional.mse_loss(model[1](model[0](x * (math.nan if bad else 1))), y).backward()
                optimizer.step()
        if monitor is not None:
            monitor.detach()
        return dict(model.state_dict()), monitor.history.skipped().tolist() if monitor is not None else []

    (armed, skipped), (plain, _) = run(armed=True), run(armed=False)
    assert [place for place, hit in enumerate(skipped) if hit] == [2 * BAD + 1]
    torch.testing.assert_close(armed, plain, rtol=0, atol=0)


def test_two_optimizers_after_one_backward_leave_no_damage_in_either_order() -> None:
    """One has finite gradients and steps, the other is skipped: the statistics are finite."""
    for order in ((0, 1), (1, 0)):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.01), torch.optim.SGD(model[1:].parameters(), lr=0.01)]
        x, y = data()
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(12):
                model.zero_grad()
                nn.functional.mse_loss(model(x * (math.nan if step == BAD else 1)), y).backward()
                for parameter in model[1:].parameters() if step == BAD else ():
                    parameter.grad = torch.zeros_like(parameter)
                for place in order:
                    optimizers[place].step()
        assert monitor.history.skipped().sum() == 1
        assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_closures_evaluated_again_leave_no_trace_either() -> None:
    """The forwards of a step that is skipped all go back, those after the decision too."""
    from tests.test_skips import Twice

    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = Twice(model.parameters())
    x, y = data()

    @torch.enable_grad()
    def closure(factor: float) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x * factor), y)
        loss.backward()
        return loss

    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(10):
            before = copy.deepcopy(model.state_dict())
            optimizer.step(lambda step=step: closure(math.nan if step == BAD else 1.0))
            if step == BAD:
                torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert monitor.history.skipped().sum() == 1


def test_buffers_that_cannot_be_given_back_are_not_claimed() -> None:
    """A checkpoint was loaded since the last step: its statistics are not overwritten by older ones, and it is said."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    loaded = copy.deepcopy(model.state_dict())
    loaded["1.running_mean"] += 5
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(10):
            if step == BAD:
                model.load_state_dict(loaded)
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (math.nan if step == BAD else 1)).backward()
            optimizer.step()
            if step == BAD:
                assert (model.get_buffer("1.running_mean") > 2).all()
        assert not monitor.history.skipped().any()
        assert "the model was written to since the last step" in monitor.notes[0]


@pytest.mark.parametrize("given_back", [True, False])
def test_it_helped_is_not_said_of_a_model_that_is_damaged(given_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN in the running statistics the record tells where; where they went back, evaluation is as good as training."""
    if not given_back:
        monkeypatch.setattr(gradwatch.AutoClip, "skips", property(lambda _: False))  # nothing is kept
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    with gradwatch.attach(model, clip=gradwatch.AutoClip("norm", hold=10), report=None, strict=True) as monitor:
        for step in range(100):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * (math.nan if step == 40 else 1)), y).backward()
            optimizer.step()
        record = monitor.incidents[0].clip
        guard = monitor.checkpoint_guard()
    assert record is not None
    assert record.released_step is not None
    model.eval()
    loss = nn.functional.mse_loss(model(x), y)
    if given_back:
        assert record.helped
        assert loss < 0.5
        assert guard
        assert guard.reason == ""
    else:
        assert record.helped is False
        assert str(record).endswith("over, with damage")
        assert "buffer 1.running_mean holds 16 NaN" in record.damage
        assert "it helped" not in str(monitor.summary())
        assert not guard
        assert guard.reason.endswith("buffer 1.running_mean holds 16 NaN and 0 infinite of 16 elements")


def _open(model: nn.Module, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], steps: int) -> None:
    x, y = data()
    for step in range(steps):
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) * factor(step)).backward()
        optimizer.step()


def test_the_guard_says_its_reason() -> None:
    """An open incident, a loss that is not finite, a parameter that is not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        assert monitor.checkpoint_guard()
        _open(model, optimizer, lambda step: 1e4 if step >= 40 else 1.0, 45)
        assert monitor.checkpoint_guard().reason.startswith("an incident has been open since step 4")
    with gradwatch.attach(model, report=None, rules=[]) as monitor:
        _open(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda step: math.nan if step == 2 else 1.0, 3)
        assert monitor.checkpoint_guard().reason == "the loss of step 2 was nan"
    model.get_parameter("2.bias").data.fill_(math.inf)
    with gradwatch.attach(model, report=None) as monitor:
        assert "parameter 0.weight holds" in monitor.checkpoint_guard().reason
        assert repr(monitor.checkpoint_guard()).startswith("Checkpoint(reason='parameter")


Both = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Both]:
    """What two processes saw of four trainings: a batch that is skipped and a buffer that is not finite, on both paths."""
    return list(zip(*played(tmp_path_factory, 2, "tests.normalised"), strict=True))


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
def test_buffers_go_back_in_every_process(later: bool, seen: list[Both]) -> None:
    """Under DistributedDataParallel, which sends those of the first to all others at each forward."""
    for one in seen[later]:
        assert one["skipped"] == [BAD]
        assert one["finite"] == [True, True, True]
        assert one["counter"] == 23
        assert one["notes"] == []


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
def test_all_processes_get_the_guards_same_answer(later: bool, seen: list[Both]) -> None:
    """A buffer that is not finite in one of them alone; where rows come later, the answer does too."""
    one, other = seen[2 + later]
    assert [one["finite"], other["finite"]] == [[True] * 3, [False, True, True]]
    assert one["guards"] == other["guards"]
    assert one["guards"][:8] == [""] * 8
    assert one["guards"][-1] == "an incident has been open since step 8: nonfinite, critical"


def normalised_training(
    optimizer_of: Any, steps: Any, *, armed: bool, closure: bool = False
) -> tuple[dict[str, Tensor], gradwatch.Monitor | None]:
    """Train a net with batch norm. A step is made of ``"forward"``, ``"backward"`` (with its forward) and ``"bad"``, one of NaN.

    Unarmed, nobody watches, and the user leaves out the forwards of bad steps that go with their backward, and the step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = optimizer_of(model)
    monitor = gradwatch.attach(model, clip="norm", report=None, strict=True) if armed else None
    draw = torch.Generator().manual_seed(1)

    def evaluate(parts: tuple[str, ...]) -> Tensor:
        loss = torch.zeros(())
        for part in parts:
            x = torch.randn(16, 6, generator=draw) * (math.nan if part == "bad" else 1.0)
            if armed or "bad" not in parts or part == "forward":
                loss = model(x).pow(2).mean()
                if part != "forward":
                    loss.backward()
        return loss

    for number, parts in enumerate(steps):
        optimizer = optimizers[number % len(optimizers)]
        if "bad" in parts and not armed:
            evaluate(parts)
            continue
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda parts=parts: evaluate(parts))
        else:
            evaluate(parts)
            optimizer.step()
    if monitor is not None:
        monitor.detach()
    return dict(model.state_dict()), monitor


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer."""
    return [torch.optim.SGD(model.parameters(), lr=0.05)]


PLAIN = [("backward",)] * 20


@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("before", [[], [10], [5, 10, 15]], ids=str)
def test_forwards_that_are_not_the_steps_are_not_taken_back_unsaid(
    later: bool, before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation that forgot `eval()` just before a bad batch: no skip is claimed, it is said, and no NaN stays."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    steps = [("forward", "backward") if step in before else ("backward",) for step in range(20)]
    fused: Any = lambda model: [torch.optim.SGD(model.parameters(), lr=0.05, fused=True)]  # noqa: E731
    state, monitor = normalised_training(fused, [*steps, ("forward", "bad"), *PLAIN], armed=True)
    assert monitor is not None
    assert not monitor.history.skipped().any()
    (note,) = monitor.notes
    assert note.startswith("a step could not be left out, and is not counted as skipped: ")
    assert ("forwards than usual" in note) is not later
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    ("optimizer_of", "steps"),
    [
        (sgd, [*PLAIN, ("forward", "backward"), ("backward",), ("bad",), *PLAIN]),  # long over
        (sgd, [("backward",) * (1 + step % 3) for step in range(20)] + [("backward", "bad"), *PLAIN]),  # accumulated
        (sgd, [("bad",), *PLAIN]),
        (lambda model: sgd(model) + sgd(model), [("backward",), ("backward", "backward")] * 9 + [("bad",)] + PLAIN),
    ],
    ids=["a forward some steps before", "uneven accumulation", "the first step", "two optimizers by turns"],
)
def test_usual_forwards_go_back_with_their_step(optimizer_of: Any, steps: Any) -> None:
    """The end is that of a training in which nobody ran the bad batch."""
    state, monitor = normalised_training(optimizer_of, steps, armed=True)
    plain, _ = normalised_training(optimizer_of, steps, armed=False)
    assert monitor is not None
    assert monitor.notes == []
    assert monitor.history.skipped().sum() == 1
    torch.testing.assert_close(state, plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_evaluations_of_a_closure_do_not_count_as_forwards_of_the_next_step(kind: str) -> None:
    """Whether it is evaluated once or as often as a line search likes."""
    optimizer_of: Any = lambda model: [getattr(torch.optim, kind)(model.parameters(), lr=1e-3)]  # noqa: E731
    steps = [*PLAIN, ("bad",), *PLAIN[:3]]
    state, monitor = normalised_training(optimizer_of, steps, armed=True, closure=True)
    assert monitor is not None
    assert not [note for note in monitor.notes if "left out" in note]
    assert monitor.history.skipped().sum() == 1
    assert all(value.isfinite().all() for value in state.values())


def test_forwards_without_a_backward_are_no_part_of_a_steps_row() -> None:
    """Losses and norms are those of a run without them: looked at, thrown away, or of a batch of NaN."""
    rows = []
    for extra in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        draw = torch.Generator().manual_seed(1)
        with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
            for step in range(40):
                x = torch.randn(16, 6, generator=draw)
                if extra:
                    model(x * 100).pow(2).mean().item()
                    model(x * math.nan).mean()
                    torch.autograd.grad(model(x * 10).sum(), list(model.parameters()))
                    model(x * 30).mean().backward()
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                if extra:
                    model(x * (step + 1)).sum()
                optimizer.step()
        rows.append(
            (monitor.history.loss().copy(), monitor.history.grad_norm().copy(), monitor.incidents, monitor.notes)
        )
    np.testing.assert_array_equal(rows[0][0], rows[1][0])
    np.testing.assert_array_equal(rows[0][1], rows[1][1])
    assert rows[0][2:] == rows[1][2:] == ([], [])


class Causal(nn.Module):
    """Attention under a causal mask of minus infinity, before a normalisation whose running mean may break."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised output, (batch, features, places)."""
        out, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return cast("Tensor", self.norm(out.transpose(1, 2)))


@pytest.mark.parametrize("persistent", [True, False])
def test_infinities_that_were_there_before_the_run_are_no_damage(persistent: bool) -> None:
    """Those that a buffer gets later are."""
    torch.manual_seed(0)
    model = Causal(persistent)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, clip=WIDE, report=None, strict=True) as monitor:
        for i in range(60):
            optimizer.zero_grad()
            (model(torch.randn(16, 6, 8)).square().mean() * (math.nan if i == BAD else 1)).backward()
            optimizer.step()
        guard = monitor.checkpoint_guard()
        assert (guard.reason, monitor.verdict) == ("", "healthy")
        assert [incident.verdict for incident in monitor.incidents] == ["resolved"]
        assert model.norm.running_mean is not None
        model.norm.running_mean[2] = math.inf
        assert monitor.checkpoint_guard().reason == "buffer norm.running_mean holds 0 NaN and 1 infinite of 8 elements"
