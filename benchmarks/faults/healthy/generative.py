"""Healthy generative models: adversarial, variational, by diffusion, flow and score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import digits, moons
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import add_score, mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_square = functional.mse_loss
_logits = functional.binary_cross_entropy_with_logits


def _gan(run: Run) -> None:
    make, judge = mlp(8, 32, 32, 2), mlp(2, 32, 32, 1, act=lambda: nn.LeakyReLU(0.2))
    model = nn.ModuleDict({"make": make, "judge": judge})
    score = add_score(model)
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
    score = add_score(model)
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


PROGRAMS: tuple[Program, ...] = (
    healthy("balanced GAN", _gan, "The maker's loss neither falls nor settles: it is balanced with the judge's."),
    healthy("Wasserstein critic", _critic, "The loss is negative and RISES to zero, for the maker improves."),
    healthy("variational autoencoder", _vae, "Summed over pixels, the loss stays near 25."),
    healthy("variational density", _vae_density, "The loss crosses zero and gradients grow as the variance shrinks."),
    healthy("annealed divergence", _annealed, "The loss rises from step 100 to 200, because a weight in it does."),
    healthy("denoising", _diffusion, "The loss stalls early at what the noise allows."),
    healthy("normalising flow", _normalising_flow, "The loss crosses zero, and a third of the tensors start at zero."),
    healthy("score matching", _score_matching, "The loss starts at zero and goes down without a floor in sight."),
)
