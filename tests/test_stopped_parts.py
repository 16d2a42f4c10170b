"""Parts of a model that no longer train: whose gradient stops, that were frozen, or that no optimizer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import device
from gradwatch.reports.summary import Summary
from gradwatch.runlog import RunLog
from gradwatch.runlog.latest import snapshot_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STOP = 200  # step from which on the program does something else

Losses = tuple[Tensor, Tensor]


class TwoHeads(nn.Module):
    """A trunk with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)
        self.aux = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def trained(
    loss_of: Callable[[TwoHeads, Tensor, int], Tensor],
    steps: int = 400,
    *,
    learns: bool = True,
    to_none: bool = True,
    **settings: Any,
) -> gradwatch.Monitor:
    """Train on a loss of the model, the batch and the step; ``learns`` is False for labels drawn by lot."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if learns else 1e-4)
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:
        for step in range(steps):
            x = torch.randn(64, 8)
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model, x, step).backward()
            optimizer.step()
    return monitor


def entropy(outputs: Tensor, x: Tensor) -> Tensor:
    """Return the cross-entropy against classes that the inputs tell."""
    return nn.functional.cross_entropy(outputs, x[:, :3].argmax(1))


def both(model: TwoHeads, x: Tensor) -> Tensor:
    """Return the loss of both heads."""
    hidden = model.trunk(x)
    return entropy(model.head(hidden), x) + entropy(model.aux(hidden), x)


def unused(model: TwoHeads, x: Tensor, step: int) -> Tensor:
    """Use the second head at first only."""
    return both(model, x) if step < STOP else entropy(model.head(model.trunk(x)), x)


def detached(model: TwoHeads, x: Tensor, step: int) -> Tensor:
    """Cut the trunk off later."""
    if step < STOP:
        return both(model, x)
    hidden = model.trunk(x).detach()
    return entropy(model.head(hidden), x) + entropy(model.aux(hidden), x)


def without_grad(model: TwoHeads, x: Tensor, step: int) -> Tensor:
    """Compute the trunk without autograd later."""
    with torch.set_grad_enabled(step < STOP):
        hidden = model.trunk(x)
    return entropy(model.head(hidden), x) + entropy(model.aux(hidden), x)


@pytest.fixture(params=["host", "device path"])
def any_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are made: gradients on the CPU can be treated as on a device."""
    if request.param == "device path":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)


@pytest.mark.parametrize(
    ("loss_of", "layer", "settings"),
    [
        (unused, "aux.0.weight", {}),
        (detached, "trunk.0.weight", {}),
        (without_grad, "trunk.0.weight", {}),
        (unused, "aux.0.weight", {"clip": "norm"}),
        (unused, "aux.0.weight", {"every": 2}),
    ],
)
def test_a_part_whose_gradient_stops_is_told_with_its_step(
    loss_of: Callable[[TwoHeads, Tensor, int], Tensor], layer: str, settings: dict[str, Any]
) -> None:
    """Although the gradient is missing, not zero."""
    monitor = trained(loss_of, **settings)
    (incident,) = [incident for incident in monitor.incidents if incident.kind == "dead"]
    assert incident.suspect == layer
    assert incident.open
    (sign,) = [sign for sign in incident.signs if sign.layer == layer]
    assert f"no gradient had reached {layer} at any measured step since step {STOP}, although the optimizer" in str(
        sign
    )
    assert f"since step {STOP}: from then on, no backward reaches {layer}" in incident.advice[0]
    assert len(incident.advice) == 1


def test_a_run_that_has_not_learned_is_not_healthy_without_a_part_of_it() -> None:
    """Where the loss has been halved without it, it is a notice."""

    def by_lot(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        return unused(model, x[torch.randperm(64)] * 0.01, step)

    assert trained(unused).verdict == "healthy"
    assert trained(by_lot, learns=False).verdict == "suspected"


def test_it_is_over_when_the_gradient_is_back() -> None:
    """Not at the first step."""

    def back(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        return unused(model, x, step if step < 300 else 0)

    (incident,) = [incident for incident in trained(back).incidents if incident.kind == "dead"]
    assert incident.closed_step is not None
    assert 300 + 16 <= incident.closed_step < 360


def one_of_two(model: TwoHeads, x: Tensor, first: bool) -> Tensor:
    """Return the loss of one head."""
    hidden = model.trunk(x)
    return entropy((model.head if first else model.aux)(hidden), x)


@pytest.mark.parametrize(
    "first",
    [
        lambda step: step % 2 == 0,
        lambda step: step % 30 > 0,
        lambda _: torch.rand(()).item() < 0.9,
        lambda _: torch.rand(()).item() < 0.98,
    ],
    ids=["by turns", "each thirtieth", "a tenth by chance", "a fiftieth by chance"],
)
def test_a_part_that_is_used_now_and_then_has_not_stopped(first: Callable[[int], bool]) -> None:
    """Neither where its steps are regular, nor where they are few."""
    monitor = trained(lambda model, x, step: one_of_two(model, x, first(step)), 900)
    assert [incident for incident in monitor.incidents if incident.kind == "dead"] == []


@pytest.mark.parametrize(("turn", "steps"), [(300, 3000), (1100, 4500)])
def test_parts_that_train_in_turns_of_many_steps_are_told_once(turn: int, steps: int) -> None:
    """Once a part has come back, an absence as long as its last one is not news, however long ago it began."""
    monitor = trained(lambda model, x, step: one_of_two(model, x, step // turn % 2 == 0), steps)
    dead = [incident for incident in monitor.incidents if incident.kind == "dead"]
    assert len(dead) == 1
    assert dead[0].closed_step is not None
    (note,) = monitor.notes
    assert note.startswith("no gradient has reached aux.0.weight, aux.0.bias, aux.2.weight and 1 more in 112 steps")


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("begin", [0, STOP])
def test_a_part_that_is_frozen_on_purpose_is_neither_dead_nor_missed(begin: int, to_none: bool) -> None:
    """Though the optimizer holds it; from the start or later, with gradients that are left at zero or removed."""

    def freezes(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        if step == begin:
            model.trunk.requires_grad_(requires_grad=False)
        return both(model, x)

    monitor = trained(freezes, to_none=to_none)
    assert monitor.incidents == []
    assert monitor.notes == []
    trunk = [name.startswith("trunk") for name in monitor.history.layers]
    assert torch.isnan(torch.tensor(monitor.history.rate)).tolist() == trunk


def test_a_model_that_is_frozen_as_a_whole_keeps_its_learning_rate() -> None:
    """No rate is known of a row without a trainable layer, which is not a rate of zero."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(300):
            model.requires_grad_(step < STOP)
            optimizer.zero_grad()
            loss = both(model, torch.randn(64, 8))
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
    assert monitor.history.facts.rate == 0.01
    assert monitor.history.zero_rate_since is None
    assert monitor.incidents == []
    assert monitor.notes == []


@pytest.mark.parametrize("held", [True, False])
def test_a_part_that_is_unfrozen_later_must_be_in_an_optimizer(held: bool) -> None:
    """The classic mistake of transfer learning: the optimizer was built from what was trainable at first."""
    torch.manual_seed(0)
    model = TwoHeads()
    model.trunk.requires_grad_(requires_grad=False)
    parameters = [one for one in model.parameters() if held or one.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(500):
            if step == 100:
                model.trunk.requires_grad_(requires_grad=True)
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            both(model, x).backward()
            optimizer.step()
    frozen = [incident for incident in monitor.incidents if incident.kind == "frozen"]
    assert [incident.suspect for incident in frozen] == ([] if held else ["trunk.0.weight"])
    if not held:
        assert frozen[0].advice[0].startswith("Build the optimizer from model.parameters() after the model is final")
        assert monitor.verdict != "healthy"


@pytest.mark.parametrize("first", [0, STOP])
def test_an_optimizer_without_any_gradient_does_not_stop_watching(first: int, tmp_path: Path) -> None:
    """Steps that no backward came before, such as with a scheduler of its own, or after the data has run out."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, log=tmp_path / "run") as monitor:
        for step in range(400):
            optimizer.zero_grad()
            if step < first:
                both(model, torch.randn(64, 8)).backward()
            optimizer.step()
        told = str(monitor.summary())
    with RunLog(tmp_path / "run") as log:
        assert "last global gradient norm none" in str(Summary(snapshot_of(log)))
    assert monitor.history.rows == 400
    assert "last global gradient norm none" in told
    assert ("now none" in told) is (first > 0)
    assert [incident.kind for incident in monitor.incidents] == ["dead"]


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("place", ["replaced", "added"])
def test_a_part_that_is_replaced_or_added_must_be_in_an_optimizer(place: str) -> None:
    """The optimizer holds the old head, if any; it does not hold the layer that now has this name."""
    torch.manual_seed(0)
    model, third = TwoHeads(), nn.Linear(32, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(500):
            x = torch.randn(64, 8)
            if step == STOP and place == "replaced":
                model.head = nn.Linear(32, 3)
            elif step == STOP:
                model.add_module("third", third)
            optimizer.zero_grad()
            loss = both(model, x)
            if step >= STOP and place == "added":
                loss = loss + entropy(third(model.trunk(x)), x)
            loss.backward()
            optimizer.step()
    layer = "head.weight" if place == "replaced" else "third.weight"
    assert not [incident for incident in monitor.incidents if incident.kind == "dead"]
    (frozen,) = [incident for incident in monitor.incidents if incident.kind == "frozen"]
    assert frozen.suspect == layer
    assert "no optimizer that made a step holds it" in str(frozen.signs[0])
    assert frozen.advice == (
        f"Build the optimizer from model.parameters() after the model is final: none that made a step holds {layer}.",
    )


def test_a_part_that_is_replaced_together_with_its_optimizer_is_not_frozen() -> None:
    """Nor dead: the new layer has no past."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(500):
            if step == STOP:
                model.head = nn.Linear(32, 3)
                optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            optimizer.zero_grad()
            both(model, torch.randn(64, 8)).backward()
            optimizer.step()
    assert not [incident for incident in monitor.incidents if incident.kind in ("dead", "frozen")]


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("to_none", [True, False])
def test_parts_that_are_frozen_by_turns_are_not_dead(to_none: bool) -> None:
    """Units without a gradient while their layer was frozen say nothing after it."""

    def turns(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        if step % 150 == 0:
            for number, part in enumerate((model.trunk, model.head, model.aux)):
                part.requires_grad_(requires_grad=step // 150 % 3 == number)
        return both(model, x)

    monitor = trained(turns, 1800, to_none=to_none)
    assert not [incident for incident in monitor.incidents if incident.kind in ("dead", "frozen")]
    assert monitor.notes == []


@pytest.mark.usefixtures("any_path")
def test_a_group_that_waits_at_rate_zero_is_not_frozen_when_its_rate_rises() -> None:
    """Its weights could not change before."""
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam([{"params": part.parameters()} for part in model.children()], lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.0 if step < STOP else 3e-3
            optimizer.zero_grad()
            both(model, torch.randn(64, 8)).backward()
            optimizer.step()
    assert monitor.incidents == []


def test_a_part_that_had_one_gradient_may_get_the_next_one_much_later() -> None:
    """A regulariser at each hundredth step, for instance: one gradient does not tell how often they come."""
    monitor = trained(lambda model, x, step: one_of_two(model, x, step % 100 > 0), 600)
    assert [incident for incident in monitor.incidents if incident.kind == "dead"] == []


def test_the_advice_names_the_step_of_its_own_layer() -> None:
    """Another one, which had a gradient in each twelfth step alone, stopped before and is told later."""

    def ends(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        hidden = model.trunk(x) if step < STOP else model.trunk(x).detach()
        loss = entropy(model.head(hidden), x)
        return loss + entropy(model.aux(hidden), x) if step < 190 and step % 12 == 0 else loss

    (incident,) = [incident for incident in trained(ends, 700).incidents if incident.kind == "dead"]
    assert {sign.numbers["since"] for sign in incident.signs} == {181, STOP}
    assert incident.suspect == "trunk.0.weight"
    assert f"since step {STOP}: from then on, no backward reaches trunk.0.weight" in incident.advice[0]


def test_what_stopped_before_a_run_was_resumed_is_told_without_its_step() -> None:
    """The rows before are not kept, and it is not noted as never reached."""
    state = trained(unused, 300).state_dict()
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        monitor.load_state_dict(state)
        for _ in range(200):
            optimizer.zero_grad()
            unused(model, torch.randn(64, 8), STOP).backward()
            optimizer.step()
    (incident,) = [incident for incident in monitor.incidents if incident.kind == "dead"]
    assert "at any measured step since step 300 or before, although the optimizer holds it" in str(incident.signs[0])
    assert "otherwise since step 300 or before: from then on" in incident.advice[0]
    assert monitor.notes == []


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("apart", ["trunk", "matrices"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_part_of_one_of_several_optimizers_stops_too(apart: str, to_none: bool) -> None:
    """Rows of another optimizer, which do not measure it, neither hide nor end that."""
    torch.manual_seed(0)
    model = TwoHeads()
    named = dict(model.named_parameters())
    first = [name for name, one in named.items() if (name.startswith("trunk") if apart == "trunk" else one.dim() == 2)]
    optimizers = [
        torch.optim.SGD([named[name] for name in first], lr=0.05),
        torch.optim.Adam([one for name, one in named.items() if name not in first], lr=3e-3),
    ]
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(400):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=to_none)
            detached(model, torch.randn(64, 8), step).backward()
            for optimizer in optimizers:
                optimizer.step()
    dead = [incident for incident in monitor.incidents if incident.kind == "dead"]
    if apart == "trunk" and not to_none:  # all gradients of an optimizer are zero where its loss is at its floor too
        assert dead == []
        return
    (incident,) = dead
    assert incident.suspect == "trunk.0.weight"
    assert incident.open
    assert incident.signs[0].numbers["since"] in (2 * STOP, 2 * STOP + 1)


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize(
    "turn",
    [lambda _: "dg", lambda step: "dg" if step % 5 == 4 else "d", lambda step: "d" if step < 300 else "g"],
    ids=["each step", "five to one", "one after the other"],
)
def test_a_generator_and_its_discriminator_have_not_stopped(turn: Callable[[int], str]) -> None:
    """Neither while the other one steps, nor where one of them steps no more."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"g": TwoHeads().trunk.append(nn.Linear(32, 8)), "d": TwoHeads().trunk.append(nn.Linear(32, 1))}
    )
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=1e-3) for name, part in model.items()}
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(600):
            for name in turn(step):
                made = model["g"](torch.randn(32, 8))
                optimizers[name].zero_grad()
                if name == "d":
                    real = nn.functional.softplus(-model["d"](torch.randn(32, 8) + 1))
                    loss = real.mean() + nn.functional.softplus(model["d"](made.detach())).mean()
                else:
                    loss = nn.functional.softplus(-model["d"](made)).mean()
                loss.backward()
                optimizers[name].step()
    assert [incident for incident in monitor.incidents if incident.kind in ("dead", "frozen")] == []


def test_a_part_that_is_used_between_the_measured_steps_alone_is_said_to_be_unseen_at_these() -> None:
    """With ``every=4`` and heads by turns, always the same head is measured."""

    def by_turns(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        return one_of_two(model, x, step % 4 < 3)

    (note,) = trained(by_turns, 600, every=4).notes
    assert note.startswith(
        "no gradient has reached aux.0.weight, aux.0.bias, aux.2.weight and 1 more in 112 measured steps"
    )
    assert note.endswith("a detach(), or a part that the loss does not use at these steps.")


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("first", [620, 1100])
def test_a_part_that_is_used_late_is_not_frozen_before_its_weights_are_looked_at_again(first: int) -> None:
    """Its gradients since the last look may have changed them."""
    monitor = trained(lambda model, x, step: one_of_two(model, x, step < first), first + 100)
    assert [incident for incident in monitor.incidents if incident.kind == "frozen"] == []


class Gan(nn.Module):
    """A generator that ends in a ReLU, and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU())
        self.discriminator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))


def adversaries(dies: int, steps: int, *, hinge: bool = False, wakes: tuple[int, ...] = ()) -> gradwatch.Monitor:
    """Train a GAN whose generator dies at a step, but for the steps in ``wakes``."""
    torch.manual_seed(0)
    model = Gan()
    last = model.generator[2]
    assert isinstance(last, nn.Linear)
    of_generator, of_discriminator = (
        torch.optim.Adam(part.parameters(), lr=rate)
        for part, rate in ((model.generator, 1e-3), (model.discriminator, 1e-2 if hinge else 1e-3))
    )

    def loss_of(outputs: Tensor, real: float) -> Tensor:
        if hinge:
            return torch.relu(1 - (2 * real - 1) * outputs).mean()
        return nn.functional.binary_cross_entropy_with_logits(outputs, torch.full_like(outputs, real))

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(steps):
            with torch.no_grad():
                if step >= dies:
                    last.bias.fill_(1.0 if step in wakes else -100.0)
            fake = model.generator(torch.randn(64, 4))
            of_discriminator.zero_grad()
            real = (9 if hinge else 1) + 0.1 * torch.rand(64, 2)
            outputs = model.discriminator(real), model.discriminator(fake.detach())
            (loss_of(outputs[0], 1.0) + loss_of(outputs[1], 0.0)).backward()
            of_discriminator.step()
            of_generator.zero_grad()
            (-model.discriminator(fake).mean() if hinge else loss_of(model.discriminator(fake), 1.0)).backward()
            of_generator.step()
    return monitor


@pytest.mark.parametrize("wakes", [(), (250, 300, 350)])
def test_a_dead_generator_beside_a_discriminator_that_learns_is_not_healthy(wakes: tuple[int, ...]) -> None:
    """All gradients of its optimizer are exactly zero, but for some steps, and its loss is higher than it was."""
    monitor = adversaries(70, 400, wakes=wakes)
    assert monitor.verdict == "suspected"
    (incident,) = [incident for incident in monitor.incidents if incident.kind == "dead"]
    assert incident.open
    assert incident.suspect == "generator.0.weight"
    assert {sign.layer for sign in incident.signs} == {
        f"generator.{n}.{what}" for n in (0, 2) for what in ("weight", "bias")
    }


def test_it_stays_dead_for_longer_than_rows_are_kept() -> None:
    """The ring has rows of neither before it died then."""
    monitor = adversaries(70, 800)
    assert monitor.verdict == "suspected"
    assert len(monitor.incidents) == 1


def test_a_discriminator_at_the_floor_of_its_hinge_is_not_dead() -> None:
    """Its loss is zero, so that there is nothing to learn, while the generator's goes on."""
    monitor = adversaries(10**9, 400, hinge=True)
    norms = monitor.history.grad_norm()
    discriminator = [name.startswith("discriminator") for name in monitor.history.layers]
    assert (norms[:, discriminator] == 0).all(axis=1).sum() > 100
    assert [incident for incident in monitor.incidents if incident.kind == "dead"] == []


def alone(objective: Callable[[Tensor, Tensor], Tensor], dies: int, steps: int = 300) -> gradwatch.Monitor:
    """Train a classifier, all of whose outputs are cut to zero by ReLUs from a step on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3), nn.ReLU())
    last = model[2]
    assert isinstance(last, nn.Linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(steps):
            if step >= dies:
                last.bias.data.fill_(-100.0)
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            objective(model(x), x).backward()
            optimizer.step()
    return monitor


def test_a_network_that_died_as_a_whole_is_dead_unless_its_loss_is_at_its_floor() -> None:
    """A loss that is zero, or lower than ever, has nothing left to learn from."""
    assert "dead" in [one.kind for one in alone(entropy, 150).incidents if one.severity == "warning"]
    assert alone(entropy, 150).verdict == "suspected"
    assert alone(lambda outputs, _: outputs.square().mean(), 150).incidents == []
    assert alone(lambda outputs, _: outputs.mean() - 1, 150).incidents == []


def test_a_network_that_dies_when_its_loss_has_halved_is_no_mere_notice() -> None:
    """Nothing learns any more: that its loss is low is no comfort. It was "healthy", with a sentence."""

    def dies(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        loss = both(model, x)
        return loss if step < STOP else 0 * loss + 0.9

    monitor = trained(dies)
    (incident,) = monitor.incidents
    assert (incident.kind, incident.severity) == ("dead", "warning")
    assert monitor.verdict == "suspected"


def test_the_notice_of_a_dead_part_is_raised_when_the_loss_is_high_again() -> None:
    """From step 600 on, labels are drawn by lot."""

    def rises(model: TwoHeads, x: Tensor, step: int) -> Tensor:
        loss = detached(model, x, step)
        return (
            loss
            if step < 3 * STOP
            else loss.detach()
            + nn.functional.cross_entropy(model.head(model.trunk(x).detach()), torch.randint(3, (64,)))
        )

    early, late = trained(rises, 3 * STOP), trained(rises, 6 * STOP)
    assert [one.severity for one in early.incidents if one.kind == "dead"] == ["notice"]
    assert early.verdict == "healthy"
    assert [one.severity for one in late.incidents if one.kind == "dead"] == ["warning"]


def test_weights_that_are_all_zero_from_the_start_never_train() -> None:
    """As both matrices of a LoRA: no gradient passes through zeros, and the loss is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 1, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(150):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), 3 * x[:, :1]).backward()
            optimizer.step()
    (incident,) = monitor.incidents
    assert (incident.kind, incident.severity) == ("dead", "warning")
    assert incident.advice[0].startswith("Initialise the weights anew, by He or Xavier: those of 0.weight are all zero")


class Named(nn.Module):
    """A linear layer whose parameters have names of their own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(outputs, inputs) / inputs), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return x @ self.w.T + self.b


@pytest.mark.parametrize(
    "made",
    [
        nn.Linear,
        Named,
        lambda *sizes: nn.utils.spectral_norm(nn.Linear(*sizes)),
        lambda *sizes: nn.utils.parametrizations.spectral_norm(nn.Linear(*sizes)),
        lambda *sizes: nn.utils.parametrizations.weight_norm(nn.Linear(*sizes)),
    ],
    ids=["plain", "own names", "spectral_norm", "parametrized spectral_norm", "parametrized weight_norm"],
)
def test_the_last_bias_of_a_critic_is_not_dead(made: Callable[[int, int], nn.Module]) -> None:
    """Its gradient cancels, whatever the weight beside it is called."""
    torch.manual_seed(0)
    critic = nn.Sequential(made(2, 32), nn.LeakyReLU(0.2), made(32, 1))
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    with gradwatch.attach(critic, report=None, strict=True) as monitor:
        for _ in range(120):
            optimizer.zero_grad()
            (critic(torch.randn(64, 2)).mean() - critic(torch.randn(64, 2) + 1).mean()).backward()
            optimizer.step()
        assert not [incident for incident in monitor.incidents if incident.kind == "dead"]
