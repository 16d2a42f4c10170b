"""Healthy trainings of unusual kinds: adversarial, reinforcement, generative, self-supervised, mixtures, equations."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks.faults.data import curve, digits, moons, rings
from benchmarks.faults.loops import batches, fit, over, train_before
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss
_logits = functional.binary_cross_entropy_with_logits


def _score(model: nn.Module) -> Tensor:
    """A place in the model where a program keeps how well it does, as such programs often log it."""
    score = torch.zeros(())
    model.register_buffer("score", score)
    return score


def _gan(run: Run) -> None:
    make, judge = mlp(8, 32, 32, 2), mlp(2, 32, 32, 1, act=lambda: nn.LeakyReLU(0.2))
    model = nn.ModuleDict({"make": make, "judge": judge})
    score = _score(model)
    makes = torch.optim.Adam(make.parameters(), lr=0.002, betas=(0.5, 0.999))
    judges = torch.optim.Adam(judge.parameters(), lr=0.002, betas=(0.5, 0.999))
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    run.watch(model)
    while True:
        real, fake = torch.randn(64, 2) * 0.5 + torch.tensor([2.0, -1.0]), make(torch.randn(64, 8))
        judges.zero_grad()
        (_logits(judge(real), 0.9 * ones) + _logits(judge(fake.detach()), zeros)).backward()
        judges.step()
        makes.zero_grad()
        loss = _logits(judge(fake), ones)
        loss.backward()
        makes.step()
        score.copy_(-(fake.detach().mean(0) - torch.tensor([2.0, -1.0])).norm())
        run.step(loss)


def _critic(run: Run) -> None:
    """Wasserstein with a gradient penalty: the critic's loss is below zero, and goes to zero as the maker improves."""
    make, critic = mlp(4, 32, 32, 1), mlp(1, 32, 32, 1, act=nn.Tanh)
    model = nn.ModuleDict({"make": make, "critic": critic})
    score = _score(model)
    makes = torch.optim.Adam(make.parameters(), lr=0.0004, betas=(0.5, 0.9))
    critics = torch.optim.Adam(critic.parameters(), lr=0.01, betas=(0.5, 0.9))
    run.watch(model)
    while True:
        for _ in range(2):
            real, fake = 1 + 0.5 * torch.randn(64, 1), make(torch.randn(64, 4)).detach()
            share = torch.rand(64, 1)
            between = (share * real + (1 - share) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            critics.zero_grad()
            loss = critic(fake).mean() - critic(real).mean() + 0.1 * ((slope.norm(dim=1) - 1) ** 2).mean()
            loss.backward()
            critics.step()
        critic.requires_grad_(False)  # noqa: FBT003
        makes.zero_grad()
        made = make(torch.randn(64, 4))
        (-critic(made).mean()).backward()
        makes.step()
        critic.requires_grad_(True)  # noqa: FBT003
        score.copy_(-(made.detach().mean() - 1).abs())
        run.step(loss)


def _walk(places: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """A corridor of nine places: a step left or right, one in ten slips; a reward at the right end."""
    slips = (torch.rand(places.shape) < 0.1).long()
    places = (places + (2 * actions - 1) * (1 - 2 * slips)).clamp(0, 8)
    return places, (places == 8).float()


def _reinforce(run: Run) -> None:
    policy = mlp(9, 32, 2, act=nn.Tanh)
    score = _score(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)

    def loss() -> Tensor:
        places, said, rewards = torch.full((16,), 4), [], []
        for _ in range(12):
            choice = torch.distributions.Categorical(logits=policy(functional.one_hot(places, 9).float()))
            actions = choice.sample()
            places, reward = _walk(places, actions)
            said.append(choice.log_prob(actions))
            rewards.append(reward)
        gains = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        score.copy_(gains[0].mean())
        return -(torch.stack(said) * (gains - gains.mean(1, keepdim=True))).mean()

    fit(run, policy, optimizer, loss)


def _actor_critic(run: Run) -> None:
    model = nn.ModuleDict({"actor": mlp(9, 24, 2, act=nn.Tanh), "critic": mlp(9, 24, 1, act=nn.Tanh)})
    score = _score(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    places, average = torch.randint(9, (32,)), 0.0

    def loss() -> Any:
        nonlocal places, average
        here = functional.one_hot(places, 9).float()
        choice = torch.distributions.Categorical(logits=model["actor"](here))
        actions = choice.sample()
        after, reward = _walk(places, actions)
        with torch.no_grad():
            aim = reward + 0.8 * model["critic"](functional.one_hot(after, 9).float()).squeeze(1)
        value = model["critic"](here).squeeze(1)
        gain = (aim - value).detach()
        places = torch.where(torch.rand(32) < 0.1, torch.randint(9, (32,)), after)  # one walker in ten starts anew
        average = 0.95 * average + 0.05 * reward.mean().item()
        score.fill_(average)
        said = choice.log_prob(actions)
        entropy = choice.entropy().mean()
        return -(said * gain).mean() + 0.5 * _square(value, aim) - 0.01 * entropy

    fit(run, model, optimizer, loss, clip=0.5)


def _dqn(run: Run) -> None:
    model = mlp(9, 48, 2)
    target = copy.deepcopy(model)
    score = _score(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Tensor:
        if run.made % 10 == 0:
            target.load_state_dict(model.state_dict(), strict=False)
        places, actions = torch.randint(9, (64,)), torch.randint(2, (64,))  # a memory that holds everything
        after, reward = _walk(places, actions)
        with torch.no_grad():
            aim = reward + 0.8 * target(functional.one_hot(after, 9).float()).max(1).values
        values = model(functional.one_hot(places, 9).float())
        score.copy_((values[:, 1] > values[:, 0]).float().mean())
        return _square(values.gather(1, actions.unsqueeze(1)).squeeze(1), aim)

    fit(run, model, optimizer, loss)


def _ppo(run: Run) -> None:
    """A contextual bandit, with four clipped steps on each batch of choices."""
    aims = torch.randn(6, 5)
    policy = mlp(6, 32, 5)
    score = _score(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    kept: tuple[Tensor, ...] = ()

    def loss() -> Tensor:
        nonlocal kept
        if run.made % 4 == 0:
            with torch.no_grad():
                context = torch.randn(128, 6)
                logits = policy(context).log_softmax(1)
                actions = torch.multinomial(logits.exp(), 1)
                reward = (context @ aims).gather(1, actions) + 0.1 * torch.randn(128, 1)
                score.copy_(reward.mean())
                kept = context, actions, logits.gather(1, actions), (reward - reward.mean()) / reward.std()
        context, actions, before, gain = kept
        ratio = (policy(context).log_softmax(1).gather(1, actions) - before).exp()
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()

    fit(run, policy, optimizer, loss)


def _steering(run: Run) -> None:
    """A policy drawn by reparameterisation steers a mass to the middle, with gradients through the dynamics."""
    policy = mlp(2, 32, 2, act=nn.Tanh)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)

    def loss() -> Tensor:
        place, speed, cost = 2 * torch.randn(32), torch.randn(32), torch.zeros(())
        for _ in range(20):
            mean, width = policy(torch.stack([place, speed], 1)).unbind(1)
            force = mean + functional.softplus(width) * torch.randn(32)
            speed = 0.95 * speed + 0.2 * force
            place = place + 0.2 * speed
            cost = cost + (place**2 + 0.1 * speed**2 + 0.01 * force**2).mean()
        return cost

    fit(run, policy, optimizer, loss, clip=10.0)


class _Experts(nn.Module):
    """Each row goes to one of six experts; those that no row goes to have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6)
        self.experts = nn.ModuleList(mlp(8, 24, 1) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.gate(x).softmax(1)
        share, chosen = shares.max(1)
        out = torch.zeros(len(x), 1)
        for place, expert in enumerate(self.experts):
            rows = (chosen == place).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, share[rows].unsqueeze(1) * expert(x[rows]))
        used = functional.one_hot(chosen, 6).float().mean(0)
        return out, 6 * (used * shares.mean(0)).sum()


def _mixture(run: Run) -> None:
    x, y = curve(1000, noise=0.05)
    model = _Experts()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(x: Tensor, y: Tensor) -> Any:
        out, balance = model(x)
        return _square(out, y) + 0.05 * balance

    fit(run, model, optimizer, over(batches(12, x, y), loss))


class _Vae(nn.Module):
    def __init__(self, inputs: int, hidden: int, code: int, outputs: int) -> None:
        super().__init__()
        self.encode, self.decode = mlp(inputs, hidden, 2 * code), mlp(code, hidden, outputs)

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(code), 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()


def _vae(run: Run) -> None:
    x, _ = digits()
    model = _Vae(64, 64, 6, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor) -> Any:
        out, distance = model(x)
        return _logits(out, x, reduction="sum") / len(x) + distance

    fit(run, model, optimizer, over(batches(64, x), loss))


def _vae_density(run: Run) -> None:
    model = _Vae(8, 48, 2, 16)
    mix = torch.randn(2, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Any:
        x = torch.randn(64, 2) @ mix + 0.1 * torch.randn(64, 8)
        out, distance = model(x)
        mean, log_scale = out.chunk(2, 1)
        log_scale = log_scale.clamp(-4, 2)
        return (0.5 * ((x - mean) / log_scale.exp()) ** 2 + log_scale).sum(1).mean() + distance

    fit(run, model, optimizer, loss)


def _annealed(run: Run) -> None:
    x, _ = digits()
    model = _Vae(64, 64, 6, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor) -> Any:
        out, distance = model(x)
        return _square(out, x, reduction="sum") / len(x) + max(0.0, min(1.0, (run.made - 100) / 100)) * 0.2 * distance

    fit(run, model, optimizer, over(batches(64, x), loss))


def _equation(run: Run) -> None:
    """Solves u'' = -pi^2 sin(pi x) on [0, 1], u = 0 at both ends."""
    model = mlp(1, 24, 24, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    ends = torch.tensor([[0.0], [1.0]])

    def loss() -> Any:
        x = torch.rand(64, 1, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + math.pi**2 * torch.sin(math.pi * x)
        return (residual**2).mean() + 20 * (model(ends) ** 2).mean()

    fit(run, model, optimizer, loss)


def _meta(run: Run) -> None:
    """Sines of random amplitude: one inner step each, and second-order gradients of what it leaves."""
    model = mlp(1, 40, 40, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss() -> Tensor:
        total = torch.zeros(())
        for _ in range(4):
            x, size, phase = 10 * torch.rand(20, 1) - 5, 0.5 + 2 * torch.rand(()), math.pi * torch.rand(())
            y = size * torch.sin(x + phase)
            weights: dict[str, Tensor] = dict(model.named_parameters())
            inner = _square(functional_call(model, weights, (x[:10],)), y[:10])
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            moved = {name: value - 0.05 * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)}
            total = total + _square(functional_call(model, moved, (x[10:],)), y[10:]) / 4
        return total

    fit(run, model, optimizer, loss)


def _triplet(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    by_class = [x[y == which] for which in range(10)]

    def code(rows: Tensor) -> Tensor:
        return functional.normalize(model(rows[torch.randint(len(rows), (24,))]), dim=1)

    def loss() -> Tensor:
        which = torch.randperm(10)
        mine, other = by_class[int(which[0])], by_class[int(which[1])]
        return functional.triplet_margin_loss(code(mine), code(mine), code(other), margin=0.3)

    fit(run, model, optimizer, loss)


def _contrastive(run: Run) -> None:
    x, _ = digits()
    model = mlp(64, 96, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor) -> Tensor:
        one, two = (functional.normalize(model(x + 0.15 * torch.randn_like(x)), dim=1) for _ in range(2))
        return _entropy(one @ two.T / 0.1, torch.arange(len(x)))

    fit(run, model, optimizer, over(batches(64, x), loss))


def _information(run: Run) -> None:
    """A bound on mutual information, made as large as can be: the loss is minus that bound."""
    critic = mlp(4, 48, 1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.003)

    def loss() -> Any:
        x = torch.randn(128, 2)
        y = x + 0.5 * torch.randn(128, 2)
        joint, apart = critic(torch.cat([x, y], 1)), critic(torch.cat([x, y.roll(1, 0)], 1))
        return -(joint.mean() - torch.logsumexp(apart, 0).squeeze() + math.log(128))

    fit(run, critic, optimizer, loss)


def _teacher(run: Run) -> None:
    """Few labels; the rest must agree with a teacher that is the student's running mean."""
    x, y = digits()
    student = mlp(64, 64, 10)
    teacher = copy.deepcopy(student).requires_grad_(False)  # noqa: FBT003
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.Adam(student.parameters(), lr=0.003)
    labelled, rest = batches(32, x[:200], y[:200]), batches(64, x)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        (some, classes), (others,) = next(labelled), next(rest)
        aim = teacher(others).softmax(1)
        agree = _square(student(others + 0.1 * torch.randn_like(others)).softmax(1), aim)
        loss = _entropy(student(some), classes) + 5 * min(1.0, run.made / 100) * agree
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
        run.step(loss)


def _distilled(run: Run) -> None:
    x, y = digits()
    teacher, student = mlp(64, 128, 10), mlp(64, 16, 10)
    before = torch.optim.Adam(teacher.parameters(), lr=0.003)
    train_before(before, over(batches(64, x, y), lambda x, y: _entropy(teacher(x), y)), 200)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.005)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            aim = (teacher(x) / 3).log_softmax(1)
        said = (student(x) / 3).log_softmax(1)
        return 9 * functional.kl_div(said, aim, log_target=True, reduction="batchmean")

    fit(run, student, optimizer, over(batches(64, x), loss))


def _self_made(run: Run) -> None:
    """Predicting one's own slow copy, without negatives: the loss is minus a cosine."""
    x, _ = digits()
    online, ahead = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32)), mlp(32, 32, 32)
    slow = copy.deepcopy(online).requires_grad_(False)  # noqa: FBT003
    model = nn.ModuleDict({"online": online, "ahead": ahead})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    score = _score(model)

    def loss(x: Tensor) -> Tensor:
        one, two = x + 0.2 * torch.randn_like(x), x + 0.2 * torch.randn_like(x)
        with torch.no_grad():
            aim = slow(two)
            for old, new in zip(slow.parameters(), online.parameters(), strict=True):
                old.lerp_(new, 0.02)
        code = online(one)
        score.copy_(functional.normalize(code.detach(), dim=1).std(0).mean())  # 0 would be a collapse
        return -functional.cosine_similarity(ahead(code), aim).mean()

    fit(run, model, optimizer, over(batches(64, x), loss))


def _diffusion(run: Run) -> None:
    x, _ = digits()
    x = (x - 0.3) * 2.5
    model = mlp(65, 128, 128, 64, act=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor) -> Tensor:
        angle, noise = 0.5 * math.pi * torch.rand(len(x), 1), torch.randn_like(x)
        return _square(model(torch.cat([angle.cos() * x + angle.sin() * noise, angle], 1)), noise)

    fit(run, model, optimizer, over(batches(64, x), loss))


class _Coupling(nn.Module):
    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept, self.net = kept, mlp(1, 32, 32, 2, act=nn.Tanh)
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x[:, self.kept], x[:, 1 - self.kept]
        scale, shift = self.net(kept.unsqueeze(1)).unbind(1)
        scale = 2 * torch.tanh(scale / 2)
        pair = [kept, moved * scale.exp() + shift]
        return torch.stack(pair[:: 1 - 2 * self.kept], 1), scale


def _normalising_flow(run: Run) -> None:
    model = nn.ModuleList(_Coupling(place % 2) for place in range(6))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Tensor:
        x, volume = 0.2 * moons(128), torch.zeros(128)
        for layer in model:
            x, grown = layer(x)
            volume = volume + grown
        return (0.5 * (x**2).sum(1) + math.log(2 * math.pi) - volume).mean()

    fit(run, model, optimizer, loss)


def _score_matching(run: Run) -> None:
    """The exact score-matching loss of points in the plane, which has no zero to fall to."""
    model = mlp(2, 48, 48, 2, act=nn.Softplus)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Any:
        x = moons(64, noise=0.3).requires_grad_()
        score = model(x)
        rows = [torch.autograd.grad(score[:, axis].sum(), x, create_graph=True)[0][:, axis] for axis in range(2)]
        return (rows[0] + rows[1] + 0.5 * (score**2).sum(1)).mean()

    fit(run, model, optimizer, loss)


class _Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, reach: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.uniform_(self.linear.weight, -reach, reach)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(20 * self.linear(x))


def _picture(run: Run) -> None:
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24))
    y = (torch.sin(9 * grid[:, :1]) * torch.cos(7 * grid[:, 1:]) + (grid.norm(dim=1, keepdim=True) < 0.5)).float()
    reach = math.sqrt(6 / 48) / 20
    model = nn.Sequential(_Sine(2, 48, 0.5), _Sine(48, 48, reach), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    fit(run, model, optimizer, lambda: _square(model(grid), y))


class _Hyper(nn.Module):
    """A net whose weights another net makes, for each task anew."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = mlp(2, 32, 1 * 16 + 16 + 16 + 1)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        first, bias, second, last = self.maker(task).split([16, 16, 16, 1], 1)
        hidden = torch.tanh(x.unsqueeze(2) * first.unsqueeze(1) * 3 + bias.unsqueeze(1) * 3)
        return torch.as_tensor((hidden * second.unsqueeze(1)).sum(2) + last)


def _hyper(run: Run) -> None:
    model = _Hyper()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Tensor:
        task, x = torch.rand(32, 2), 4 * torch.rand(32, 16) - 2
        return _square(model(task, x), (0.5 + task[:, :1]) * torch.sin(2 * x + 2 * task[:, 1:]))

    fit(run, model, optimizer, loss)


def _ensemble(run: Run) -> None:
    x, y = curve(600, noise=0.1)
    model = nn.ModuleList(mlp(8, 24, 1) for _ in range(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wrong = [_square(member(x), y) for member in model if torch.rand(()) < 0.5]  # each sees half of the batches
        return torch.stack(wrong).sum() if wrong else 0 * model[0](x).sum()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _saddle(run: Run) -> None:
    """A deep linear net from small weights: it learns one direction after another, with rests between."""
    aim = torch.linalg.qr(torch.randn(8, 8))[0] * torch.tensor([4.0, 2.0, 1.0, 0, 0, 0, 0, 0]).unsqueeze(1)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.07)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)

    def loss() -> Tensor:
        x = torch.randn(256, 8)
        return _square(model(x), x @ aim.T)

    fit(run, model, optimizer, loss, clip=2.0)


def _turned(run: Run) -> None:
    """A classifier, and a judge whose gradients are turned round before the trunk."""
    x, y = digits()
    trunk, classes, judge = mlp(64, 64, 32), nn.Linear(32, 10), mlp(32, 32, 1)
    model = nn.ModuleDict({"trunk": trunk, "classes": classes, "judge": judge})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        brighter = torch.rand(len(x), 1).round()
        seen = torch.relu(trunk(x * (1 + 0.5 * brighter)))
        turned = 1.3 * seen.detach() - 0.3 * seen  # the value of seen, and -0.3 times its gradient
        return _entropy(classes(seen), y) + _logits(judge(turned), brighter)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _pruned(run: Run) -> None:
    """Half of the weights are set to zero at step 150, and stay so."""
    x, y = rings(1000)
    model = mlp(2, 48, 48, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    masks: dict[str, Tensor] = {}
    data = batches(64, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        inputs, classes = next(data)
        loss = _entropy(model(inputs), classes)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if run.made == 150 and weight.dim() == 2:
                    masks[name] = (weight.abs() >= weight.abs().quantile(0.5)).float()
                if name in masks:
                    weight.mul_(masks[name])
        run.step(loss)


PROGRAMS: tuple[Program, ...] = (
    healthy("balanced GAN", _gan, "The maker's loss neither falls nor settles: it is balanced with the judge's."),
    healthy("Wasserstein critic", _critic, "The loss is negative and RISES to zero, for the maker improves."),
    healthy("REINFORCE in a corridor", _reinforce, "The loss says nothing, and gradients are mostly noise."),
    healthy("actor and critic", _actor_critic, "The loss rises at first, when rewards are found."),
    healthy(
        "Q-learning in a corridor",
        _dqn,
        "The loss rises and never settles near zero, because its aims are learned too.",
    ),
    healthy("clipped policy steps", _ppo, "The loss is zero at every fourth step, and never far from it."),
    healthy(
        "steering by reparameterisation",
        _steering,
        "The first losses are near a hundred, through twenty steps.",
    ),
    healthy("mixture of experts", _mixture, "Experts to which no row goes have no gradient in that step."),
    healthy("variational autoencoder", _vae, "Summed over pixels, the loss stays near 25."),
    healthy("variational density", _vae_density, "The loss crosses zero and gradients grow as the variance shrinks."),
    healthy("annealed divergence", _annealed, "The loss rises from step 100 to 200, because a weight in it does."),
    healthy(
        "differential equation", _equation, "Third-order gradients, and a loss that starts near 50 and falls by orders."
    ),
    healthy("learning to learn", _meta, "Second-order gradients, and a loss that depends on the tasks drawn."),
    healthy("triplets", _triplet, "Once all triplets are apart, loss and gradients are exactly zero in many steps."),
    healthy("contrast within the batch", _contrastive, "Small gradients through a normalised code."),
    healthy("bound on information", _information, "The loss is negative, falls, and is noisy."),
    healthy(
        "agreeing with a slow teacher",
        _teacher,
        "A weight in the loss climbs, and half of the tensors never have a gradient.",
    ),
    healthy("distilled", _distilled, "The loss falls to almost nothing, gradients with it."),
    healthy(
        "predicting a slow copy",
        _self_made,
        "The loss goes to -1 and gradients to nothing, and yet it has not collapsed.",
    ),
    healthy("denoising", _diffusion, "The loss stalls early at what the noise allows."),
    healthy("normalising flow", _normalising_flow, "The loss crosses zero, and a third of the tensors start at zero."),
    healthy("score matching", _score_matching, "The loss starts at zero and goes down without a floor in sight."),
    healthy("picture by sines", _picture, "Frequencies of 20 make steep gradients on small weights."),
    healthy("weights made by a net", _hyper, "One net's output is another's weights."),
    healthy(
        "ensemble, half asleep",
        _ensemble,
        "Members sleep at random, so their gradients come and go and the loss jumps.",
    ),
    healthy(
        "deep linear net from small weights", _saddle, "A plateau at the start, and more between the directions.", 400
    ),
    healthy("turned gradients", _turned, "One part works against another, so one loss does not fall."),
    healthy("pruned midway", _pruned, "At step 150 half of the weights become zero and the loss jumps."),
)
