"""Healthy trainings whose signal comes in bursts or changes scale by design: rewards, curricula, targets, lengths, margins."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import correct, explained, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


# Rewards and values.


def _lock(run: Run) -> None:
    """A lock of five digits 0..2: a reward for the whole combination alone, one try in 243, two tries a step."""
    policy = mlp(5, 16, 3, act=nn.Tanh)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    places, combination = torch.eye(5), torch.tensor([2, 0, 1, 1, 2])

    def judge() -> HeldOut:
        with torch.no_grad():
            chance = policy(places).softmax(1).gather(1, combination.unsqueeze(1)).prod().item()
        return HeldOut(1 - chance, chance)

    run.judged_by(judge)

    def objective() -> Any:
        said = policy(places).log_softmax(1)
        tries = torch.multinomial(said.detach().exp(), 2, replacement=True)  # (place, try)
        reward = (tries == combination.unsqueeze(1)).all(0).float()
        return -(said.gather(1, tries).sum(0) * reward).mean()

    fit(run, policy, optimizer, objective)


_LENGTH = 9  # steps from one end to the other


def _corridor(run: Run) -> None:
    """A corridor of ten places from the left end; its right end alone pays, and that to one walker in ten; SGD."""
    policy = mlp(_LENGTH + 1, 16, 2, act=nn.Tanh)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    here = torch.eye(_LENGTH + 1)

    def judge() -> HeldOut:
        """The chance to arrive, exactly."""
        with torch.no_grad():
            right = policy(here).softmax(1)[:, 1]
        at = here[0]
        for _ in range(14):
            ahead, back = at[:-1] * right[:-1], at[:-1] * (1 - right[:-1])
            moved = torch.zeros(_LENGTH + 1)
            moved[1:] += ahead
            moved[:-2] += back[1:]
            moved[0] += back[0]
            moved[-1] += at[-1]
            at = moved
        return HeldOut(1 - at[-1].item(), at[-1].item())

    run.judged_by(judge)

    def objective() -> Any:
        said = policy(here).log_softmax(1)
        chance, lots = said.detach()[:, 1].exp(), torch.rand(14, 8)
        place, visited, moves = torch.zeros(8, dtype=torch.long), [], []
        for lot in lots:
            right = (lot < chance[place]).long()
            visited.append(place)
            moves.append(right)
            place = torch.where(place == _LENGTH, place, (place + 2 * right - 1).clamp(min=0))
        spoken = said[torch.stack(visited), torch.stack(moves)].sum(0)
        return -(spoken * ((place == _LENGTH) & (torch.rand(8) < 0.1))).mean()

    fit(run, policy, optimizer, objective)


_SIDE, _DISCOUNT = 5, 0.9


def _grid() -> tuple[Tensor, Tensor, Tensor]:
    """Where each of four moves leads from each of 25 places, what it pays, and what it is worth ``(25, 4)``."""
    place = torch.arange(_SIDE**2)
    row, column = place // _SIDE, place % _SIDE
    moves = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
    rows = (row.unsqueeze(1) + moves[:, 0]).clamp(0, _SIDE - 1)
    columns = (column.unsqueeze(1) + moves[:, 1]).clamp(0, _SIDE - 1)
    after = rows * _SIDE + columns
    reward = 10.0 * (after == _SIDE**2 - 1)
    worth = torch.zeros(_SIDE**2, 4)
    for _ in range(100):
        worth = reward + _DISCOUNT * worth.max(1).values[after] * (after != _SIDE**2 - 1)
    return after, reward, worth


def _judge_values(run: Run, model: nn.Module, worth: Tensor) -> None:
    """The squared error of the values, and the share of places in which the best move is chosen."""
    places = torch.eye(len(worth))[:-1]

    def judge() -> HeldOut:
        with torch.no_grad():
            values = model(places)
        chosen = worth[:-1].gather(1, values.argmax(1, keepdim=True)).squeeze(1)
        best = (chosen >= worth[:-1].max(1).values - 1e-4).float().mean().item()
        return HeldOut(_square(values, worth[:-1]).item(), best)

    run.judged_by(judge)


def _target_network(run: Run) -> None:
    """Q-learning on a grid whose goal alone pays; the target is copied every 200 steps."""
    after, reward, worth = _grid()
    model = mlp(_SIDE**2, 48, 4)
    target, places = copy.deepcopy(model), torch.eye(_SIDE**2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    _judge_values(run, model, worth)

    def objective() -> Tensor:
        if run.made % 200 == 0:
            target.load_state_dict(model.state_dict())
        place, move = torch.randint(_SIDE**2 - 1, (32,)), torch.randint(4, (32,))
        then = after[place, move]
        with torch.no_grad():
            aim = reward[place, move] + _DISCOUNT * target(places[then]).max(1).values * (then != _SIDE**2 - 1)
        return _square(model(places[place]).gather(1, move.unsqueeze(1)).squeeze(1), aim)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _prioritised(run: Run) -> None:
    """Moves are drawn by how wrong their value was, and weighted back; the target is copied every 100 steps."""
    after, reward, worth = _grid()
    after, reward, steps = after.flatten()[:-4], reward.flatten()[:-4], 4 * (_SIDE**2 - 1)
    model = mlp(_SIDE**2, 48, 4)
    target, places = copy.deepcopy(model), torch.eye(_SIDE**2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    priority = torch.ones(steps)
    _judge_values(run, model, worth)

    def objective() -> Tensor:
        if run.made % 100 == 0:
            target.load_state_dict(model.state_dict())
        chance = priority**0.6 / (priority**0.6).sum()
        drawn = torch.multinomial(chance, 16, replacement=True)
        weight = (steps * chance[drawn]) ** -0.4
        then = after[drawn]
        with torch.no_grad():
            aim = reward[drawn] + _DISCOUNT * target(places[then]).max(1).values * (then != _SIDE**2 - 1)
        wrong = model(places[drawn // 4]).gather(1, (drawn % 4).unsqueeze(1)).squeeze(1) - aim
        priority[drawn] = wrong.detach().abs() + 1e-3
        return (weight / weight.max() * functional.smooth_l1_loss(wrong, torch.zeros(16), reduction="none")).mean()

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


# Tasks that change.


def _growing_tasks(run: Run) -> None:
    """Four tasks one after another, each on targets three times as large."""
    model = mlp(8, 48, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ways = torch.randn(4, 8, 1, generator=unseen()) / 8**0.5
    x = torch.randn(2000, 8, generator=unseen())

    def aim(x: Tensor, task: int) -> Tensor:
        return 3.0**task * torch.sin(x @ ways[task])

    def judge() -> HeldOut:
        with torch.no_grad():
            out, y = model(x), aim(x, 3)
        return HeldOut(_square(out, y).item(), explained(out, y))

    run.judged_by(judge)

    def objective() -> Tensor:
        x = torch.randn(32, 8)
        return _square(model(x), aim(x, min(3, 4 * run.made // run.steps)))

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _more_classes(run: Run) -> None:
    """Two classes first, and two more every quarter of the run; the new ones make one row in four."""
    centres = 1.5 * torch.randn(8, 8, generator=unseen())
    model = mlp(8, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def rows(classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return centres[classes] + torch.randn(len(classes), 8, generator=generator)

    last = 6 + torch.arange(2000) % 2
    x = rows(last, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(x), last)

    run.judged_by(judge)

    def objective() -> Tensor:
        known = 2 + 2 * min(3, 4 * run.made // run.steps)
        y = torch.randint(known, (32,))
        return _entropy(model(rows(y)), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _new_head(run: Run) -> None:
    """After 300 steps of regression a new head, a new loss and a new optimizer."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    unseen_rows = torch.randn(2000, 8, generator=unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(unseen_rows), unseen_rows[:, :4].argmax(1))

    run.watch(model)
    while True:
        if run.made == 300:
            model[4] = nn.Linear(32, 4)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            run.judged_by(judge)
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        loss = _square(model(x), x[:, :1]) if run.made < 300 else _entropy(model(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        run.step(loss)


def _lazy_penalty(run: Run) -> None:
    """A penalty on the slope, taken every 16 steps and counted 16 times, as image generators do it."""
    model = mlp(8, 32, 32, 1, act=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    unseen_rows = torch.randn(2000, 8, generator=unseen())

    def penalty(x: Tensor) -> Any:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return 0.02 * (slope**2).sum(1).mean()

    def aim(x: Tensor) -> Tensor:
        return torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] ** 2

    def judge() -> HeldOut:
        x = unseen_rows.clone()
        bad = penalty(x).item()
        with torch.no_grad():
            out = model(x)
        return HeldOut(_square(out, aim(x)).item() + bad, explained(out, aim(x)))

    run.judged_by(judge)

    def objective() -> Any:
        x = torch.randn(32, 8)
        loss = _square(model(x), aim(x))
        return loss + 16 * penalty(x) if run.made % 16 == 0 else loss

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


# Margins and contrasts.


def _clouds(classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    centres = 1.2 * torch.randn(6, 8, generator=unseen())
    return centres[classes] + 0.5 * torch.randn(len(classes), 8, generator=generator)


def _triplets(run: Run) -> None:
    """Once almost all triplets are apart, most batches of eight have no gradient at all."""
    model = mlp(8, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def three(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.randint(6, (rows,), generator=generator)
        other = (one + torch.randint(1, 6, (rows,), generator=generator)) % 6
        return _clouds(one, generator), _clouds(one, generator), _clouds(other, generator)

    def loss(anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return functional.triplet_margin_loss(model(anchor), model(near), model(far))

    held_out = three(4000, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            anchor, near, far = (model(x) for x in held_out)
            apart = (anchor - far).norm(dim=1) > (anchor - near).norm(dim=1) + 1
            return HeldOut(functional.triplet_margin_loss(anchor, near, far).item(), apart.float().mean().item())

    run.judged_by(judge)
    fit(run, model, optimizer, lambda: loss(*three(8)), schedule=to_zero(optimizer, run))


def _hinge(run: Run) -> None:
    """The hinge loss of classes that a margin parts: near the end a row in hundreds says anything."""
    model = mlp(8, 32, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    y = torch.arange(6000) % 6
    x = _clouds(y, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            logits = model(x)
            own = logits.gather(1, y.unsqueeze(1))
            margin = own.squeeze(1) - logits.scatter(1, y.unsqueeze(1), -torch.inf).max(1).values
            return HeldOut(functional.multi_margin_loss(logits, y).item(), (margin > 1).float().mean().item())

    run.judged_by(judge)

    def objective() -> Tensor:
        y = torch.randint(6, (4,))
        return functional.multi_margin_loss(model(_clouds(y)), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _hard_batches(run: Run) -> None:
    """Each row is to find its own copy; one batch in twenty is of rows that lie close together."""
    model = mlp(12, 32, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def pair(rows: int, width: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Twice the same six features, each time with six others that say nothing."""
        x = width * torch.randn(rows, 6, generator=generator) + torch.randn(1, 6, generator=generator)
        one, two = torch.randn(2, rows, 6, generator=generator)
        return torch.cat([x, one], 1), torch.cat([x, two], 1)

    def alike(one: Tensor, two: Tensor) -> Any:
        return functional.normalize(model(one), dim=-1) @ functional.normalize(model(two), dim=-1).mT / 0.05

    generator, own = unseen(), torch.arange(16)
    close = [torch.stack(parts) for parts in zip(*(pair(16, 0.3, generator) for _ in range(100)), strict=True)]

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(alike(close[0], close[1]).flatten(0, 1), own.repeat(100))

    run.judged_by(judge)

    def objective() -> Tensor:
        return _entropy(alike(*pair(16, 0.3 if torch.rand(()) < 0.05 else 1.5)), own)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


# Lengths.


def _utterance(length: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """So many letters, each held for two or three frames with noise ``(1, 8, frames)``, and the letters."""
    shapes = 1.5 * torch.randn(5, 8, generator=unseen())
    letters = torch.randint(1, 5, (length,), generator=generator).cumsum(0) % 5  # none twice in a row
    held = letters.repeat_interleave(torch.randint(2, 4, (length,), generator=generator))
    return (shapes[held] + 0.5 * torch.randn(len(held), 8, generator=generator)).T.unsqueeze(0), letters + 1


def _spoken_lengths(run: Run) -> None:
    """CTC, one utterance a step and its loss summed: most have two letters, one in ten has twenty."""
    model = nn.Sequential(nn.Conv1d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 6, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CTCLoss(reduction="sum")

    def loss(frames: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        said = model(frames).permute(2, 0, 1).log_softmax(2)
        return criterion(said, letters.unsqueeze(0), [len(said)], [len(letters)]), said

    generator = unseen()
    long = [_utterance(20, generator) for _ in range(60)]

    def judge() -> HeldOut:
        wrong, right = 0.0, 0
        with torch.no_grad():
            for frames, letters in long:
                each, said = loss(frames, letters)
                heard = said[:, 0].argmax(1).unique_consecutive()
                wrong += each.item() / len(long)
                right += _edits(heard[heard > 0].tolist(), letters.tolist())
        return HeldOut(wrong, 1 - right / (20 * len(long)))

    run.judged_by(judge)
    fit(
        run,
        model,
        optimizer,
        lambda: loss(*_utterance(20 if torch.rand(()) < 0.1 else 2))[0],
        schedule=to_zero(optimizer, run),
    )


def _edits(heard: list[int], said: list[int]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(said) + 1))
    for place, letter in enumerate(heard, 1):
        before, row[0] = row[0], place
        for at, own in enumerate(said, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (letter != own))
    return row[-1]


def _rare_words(run: Run) -> None:
    """The next word, its loss summed over sentences of 2 to 64 words; words are as rare as in a language."""
    chance = 1 / (1.0 + torch.arange(40))
    follows = torch.randperm(40, generator=unseen())
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 40))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def sentence(length: int) -> tuple[Tensor, Tensor]:
        """Half of the places follow from the word before, the others are drawn."""
        x = torch.multinomial(chance, length, replacement=True)
        return x, torch.where(torch.rand(length) < 0.8, follows[x], torch.multinomial(chance, length, replacement=True))

    last = torch.arange(20, 40)

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(last), follows[last])

    run.judged_by(judge)

    def objective() -> Tensor:
        x, y = sentence(int(2 ** (1 + 5 * torch.rand(())).item()))
        return _entropy(model(x), y, reduction="sum")

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


BEST = "share of places with the best move"
PROGRAMS: tuple[Program, ...] = (
    rare(
        "a lock that pays once in 243",
        _lock,
        "At first 120 steps in 121 have no reward, and no gradient at all.",
        "chance to open the lock",
        steps=3000,
    ),
    rare(
        "a corridor whose end alone pays",
        _corridor,
        "At first 97 steps of 100 have no gradient, and later every second.",
        "chance to arrive",
    ),
    rare(
        "targets copied every 200 steps",
        _target_network,
        "Every copy makes loss and gradients jump, and values grow to ten.",
        BEST,
        0.5,
        3000,
    ),
    rare(
        "replay by priority",
        _prioritised,
        "What is most wrong is drawn most, so that a reward that is found comes in bursts.",
        BEST,
        0.5,
    ),
    rare(
        "tasks of growing scale",
        _growing_tasks,
        "Three times the loss jumps to another scale, and comes down.",
        "variance of the last task that is explained",
    ),
    rare(
        "classes added in turn",
        _more_classes,
        "Three times the loss jumps from almost nothing, and comes down.",
        "accuracy on the last classes",
    ),
    rare(
        "a new head and a new loss",
        _new_head,
        "At step 300 the loss is another one, at a hundred times the level, and one layer is new.",
        "accuracy of the new head",
        0.25,
        1500,
    ),
    rare(
        "a penalty every 16 steps",
        _lazy_penalty,
        "Every sixteenth loss is many times the others, and its gradient asks for something else.",
        "variance explained",
    ),
    rare(
        "triplets, mostly apart",
        _triplets,
        "In the end nine batches of ten have exactly no gradient, and one has.",
        "share of triplets a margin apart",
    ),
    rare(
        "classes a margin apart",
        _hinge,
        "In the end most batches have exactly no gradient, and some have.",
        "share of rows a margin apart",
    ),
    rare(
        "contrast with hard batches",
        _hard_batches,
        "One batch in twenty is hard: its loss is many times the others'.",
        "accuracy in hard batches",
        1 / 16,
    ),
    rare(
        "short and long utterances",
        _spoken_lengths,
        "The summed loss of a long utterance is ten times that of a short one.",
        "letters of long utterances heard right",
    ),
    rare(
        "rare words in sentences of any length",
        _rare_words,
        "The summed loss goes with the length, from 2 to 64, and a rare word has a gradient of its own.",
        "accuracy after rare words",
    ),
)
