"""Healthy trainings on tables and images: nothing is wrong with any, and each has something that looks wrong."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

from benchmarks.faults.data import centred_images, curve, digits, rings
from benchmarks.faults.loops import batches, fit, over, train_before
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _logistic(run: Run) -> None:
    x, y = digits()
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.5), lambda: _entropy(model(x), y))


def _ill_conditioned(run: Run) -> None:
    scale = torch.logspace(-1, 1, 10)
    x = torch.randn(500, 10) * scale
    y = x @ (torch.randn(10, 1) / scale.unsqueeze(1)) + 0.05 * torch.randn(500, 1)
    model = nn.Linear(10, 1)
    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.008), lambda: _square(model(x), y))


def _lbfgs(run: Run) -> None:
    x, y = curve(300, noise=0.05)
    model = mlp(8, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _square(model(x), y)
        loss.backward()
        return loss

    run.watch(model)
    while True:
        run.step(optimizer.step(closure))


def _large_targets(run: Run) -> None:
    x, y = curve(1000)
    model = mlp(8, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    fit(run, model, optimizer, over(batches(64, x, 100 + 30 * y), lambda x, y: _square(model(x), y)))


def _summed(run: Run) -> None:
    x, y = curve(2000, noise=0.3)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    fit(run, model, optimizer, over(batches(512, x, y), lambda x, y: _square(model(x), y, reduction="sum")))


def _parity(run: Run) -> None:
    model = mlp(6, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def loss() -> Tensor:
        x = torch.randint(2, (128, 6)) * 2.0 - 1
        return functional.binary_cross_entropy_with_logits(model(x), (x[:, :3].prod(1, keepdim=True) + 1) / 2)

    fit(run, model, optimizer, loss)


def _xor_table(run: Run) -> None:
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    y = (x.prod(1, keepdim=True) + 1) / 2
    model = mlp(4, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(run, model, optimizer, lambda: functional.binary_cross_entropy_with_logits(model(x), y))


def _exact_fit(run: Run) -> None:
    x = torch.randn(200, 10)
    y = x @ torch.randn(10, 2)
    model = nn.Linear(10, 2)
    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        over(batches(64, x, y), lambda x, y: _square(model(x), y)),
    )


def _autoencoder(run: Run) -> None:
    x = torch.randn(500, 3) @ torch.randn(3, 12) / 2
    model = mlp(12, 32, 6, 32, 12, act=nn.GELU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    fit(run, model, optimizer, over(batches(128, x), lambda x: _square(model(x), x)), schedule=schedule)


def _gaussian(run: Run) -> None:
    x = torch.rand(1000, 1) * 4 - 2
    y = torch.sin(2 * x) + (0.02 + 0.04 * x.abs()) * torch.randn(1000, 1)
    model = mlp(1, 32, 32, 2, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = model(x).chunk(2, 1)
        return functional.gaussian_nll_loss(mean, y, log_variance.exp(), eps=1e-4)

    fit(run, model, optimizer, over(batches(128, x, y), loss))


def _batch_of(size: int, rate: float) -> Any:
    def train(run: Run) -> None:
        x, y = centred_images()
        model = mlp(64, 48, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        fit(run, model, optimizer, over(batches(size, x.flatten(1), y), lambda x, y: _entropy(model(x), y)))

    return train


def _dropout(run: Run) -> None:
    x, y = digits()
    model = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _cyclical(run: Run) -> None:
    x, y = centred_images()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = lr_scheduler.CyclicLR(optimizer, 0.005, 0.1, step_size_up=40, cycle_momentum=False)
    objective = over(batches(64, x.flatten(1), y), lambda x, y: _entropy(model(x), y))
    fit(run, model, optimizer, objective, schedule=schedule)


def _restarts(run: Run) -> None:
    x, y = curve(1500)
    model = mlp(8, 48, 48, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=50, T_mult=2)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _square(model(x), y)), schedule=schedule)


def _one_cycle(run: Run) -> None:
    x, y = centred_images()
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=run.steps + 1)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)), schedule=schedule)


def _curriculum(run: Run) -> None:
    x, y = digits()
    easy = y < 3
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    early, late = batches(64, x[easy], y[easy]), batches(64, x, y)

    def loss() -> Tensor:
        inputs, classes = next(early if run.made < 100 else late)
        return _entropy(model(inputs), classes)

    fit(run, model, optimizer, loss)


def _unfreezing(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 64, 10)
    mirrored = x.reshape(-1, 8, 8).flip(2).flatten(1)
    before = torch.optim.Adam(model.parameters(), lr=0.003)
    train_before(before, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    data = batches(64, mirrored, y)

    def loss() -> Tensor:
        for depth, layer in enumerate(reversed(layers)):  # the head is free at once, and one more layer every 60 steps
            layer.requires_grad_(run.made >= 60 * depth)
        inputs, classes = next(data)
        return _entropy(model(inputs), classes)

    fit(run, model, optimizer, loss)


def _frozen(run: Run) -> None:
    x, y = centred_images()
    backbone = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), mlp(512, 32, 10))  # noqa: FBT003
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)  # noqa: FBT003
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + 2 * x @ self.a.T @ self.b.T


def _lora(optimizer: type[torch.optim.Optimizer], **options: float) -> Any:
    def train(run: Run) -> None:
        x, y = digits()
        base = mlp(64, 96, 96, 10)
        before = torch.optim.Adam(base.parameters(), lr=0.003)
        train_before(before, over(batches(64, x, y), lambda x, y: _entropy(base(x), y)), 150)
        turned = x.reshape(-1, 8, 8).transpose(1, 2).flatten(1)
        model = nn.Sequential(*(_Lora(part, 8) if isinstance(part, nn.Linear) else part for part in base))
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made: Any = optimizer  # each takes its own options
        objective = over(batches(64, turned, y), lambda x, y: _entropy(model(x), y))
        fit(run, model, made(adapters, **options), objective)

    return train


class _Heads(nn.Module):
    def __init__(self, trunk: nn.Module, width: int, *outputs: int) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(nn.Linear(width, output) for output in outputs)

    def forward(self, x: Tensor, head: int) -> Any:
        return self.heads[head](self.trunk(x))


def _rare_heads(run: Run) -> None:
    x, y = digits()
    targets = [y, y % 2, y // 5, (y == 8).long()]
    model = _Heads(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 64, 10, 2, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    run.watch(model)
    while True:
        head = 3 if run.made % 40 == 39 else 2 if run.made % 15 == 14 else run.made % 2
        optimizer.zero_grad(set_to_none=False)
        chosen = torch.randint(len(x), (64,))
        loss = _entropy(model(x[chosen], head), targets[head][chosen])
        loss.backward()
        optimizer.step()
        run.step(loss)


def _alternating(run: Run) -> None:
    x, y = digits()
    ink = 150 * (x.mean(1, keepdim=True) - x.mean())
    model = _Heads(mlp(64, 64, 64), 64, 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    data = batches(64, x, y, ink)

    def loss() -> Tensor:
        inputs, classes, amount = next(data)
        if run.made % 2:
            return _entropy(model(inputs, 0), classes)
        return _square(model(inputs, 1), amount)

    fit(run, model, optimizer, loss)


def _decayed(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _smoothed(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 10, act=nn.GELU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y, label_smoothing=0.2)))


def _large_batch(run: Run) -> None:
    x, y = centred_images()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    objective = over(batches(1024, x.flatten(1), y), lambda x, y: _entropy(model(x), y))
    fit(run, model, optimizer, objective, schedule=schedule)


def _accumulated(run: Run) -> None:
    x, y = curve(1000)
    model = mlp(8, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = batches(8, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in itertools.islice(data, 8):
            loss = _square(model(inputs), targets) / 8
            loss.backward()
            total += loss.item()
        optimizer.step()
        run.step(total)


def _clipped(run: Run) -> None:
    x, y = curve(1000, noise=0.2)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    fit(run, model, optimizer, over(batches(16, x, 3 * y), lambda x, y: _square(model(x), y)), clip=0.5)


def _adagrad(run: Run) -> None:
    words = (torch.rand(1000, 200) < 1 / torch.arange(1, 201)).float()
    y = (words @ torch.randn(200, 1) > 0).float()
    model = mlp(200, 16, 1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    loss = functional.binary_cross_entropy_with_logits
    fit(run, model, optimizer, over(batches(32, words, y), lambda x, y: loss(model(x), y)))


def _nesterov(run: Run) -> None:
    x, y = rings(1000)
    model = mlp(2, 32, 32, 32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.95, nesterov=True)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _rmsprop(run: Run) -> None:
    x, y = centred_images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _weight_norm(run: Run) -> None:
    x, y = curve(1000)
    layers = [parametrizations.weight_norm(nn.Linear(*sizes)) for sizes in ((8, 48), (48, 48), (48, 1))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _square(model(x), y)))


def _spectral_norm(run: Run) -> None:
    x, y = digits()
    layers = [parametrizations.spectral_norm(nn.Linear(*sizes)) for sizes in ((64, 64), (64, 64))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _conv(width: int, norm: Any) -> nn.Sequential:
    first = [nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _batch_norm(run: Run) -> None:
    x, y = centred_images()
    model = _conv(16, nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _group_norm(run: Run) -> None:
    x, y = centred_images()
    model = _conv(16, lambda width: nn.GroupNorm(4, width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(8, x, y), lambda x, y: _entropy(model(x), y)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.two.weight)
        nn.init.zeros_(self.two.bias)

    def forward(self, x: Tensor) -> Any:
        return x + self.two(torch.relu(self.one(self.norm(x))))


def _zero_residual(run: Run) -> None:
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), *(_Residual(32) for _ in range(5)), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _hinge(run: Run) -> None:
    x = torch.randn(600, 20)
    score = x @ torch.randn(20)
    far = score.abs() > 1.0  # a gap between the classes, so that the hinge can reach zero
    x, y = x[far], score[far].sign()
    model = nn.Linear(20, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(run, model, optimizer, over(batches(16, x, y), lambda x, y: torch.relu(1 - y * model(x).squeeze(1)).mean()))


def _noisy_labels(run: Run) -> None:
    x, y = digits()
    y = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _imbalanced(run: Run) -> None:
    x = torch.randn(4000, 10)
    y = (torch.rand(4000) < 0.02).float()
    x[:, :2] += 3 * y.unsqueeze(1)
    model = mlp(10, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    loss = functional.binary_cross_entropy_with_logits
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: loss(model(x).squeeze(1), y)))


def _heavy_tailed(run: Run) -> None:
    x, y = curve(2000, noise=0.0)
    y = 2 * y + 0.3 * torch.distributions.StudentT(2.0).sample(y.shape)
    model = mlp(8, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: functional.huber_loss(model(x), y)))


def _heavy_tailed_square(run: Run) -> None:
    x, y = curve(2000, noise=0.0)
    y = 3 * y + 0.3 * torch.distributions.StudentT(2.5).sample(y.shape)
    model = mlp(8, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _square(model(x), y)))


def _quantile(run: Run) -> None:
    x, y = curve(1500, noise=0.3)
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = mlp(8, 48, 48, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        error = y - model(x)
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _poisson(run: Run) -> None:
    x, y = curve(1500, noise=0.0)
    counts = torch.poisson((2.5 + 0.8 * y).exp())
    model = mlp(8, 32, 32, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(64, x, counts), lambda x, y: functional.poisson_nll_loss(model(x), y)))


def _step_decay(run: Run) -> None:
    x, y = centred_images()
    model = _conv(12, nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = lr_scheduler.MultiStepLR(optimizer, [150, 225], 0.1)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)), schedule=schedule)


def _deep_tanh(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 48, 48, 48, 48, 48, 10, act=nn.Tanh)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _bfloat(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 96, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _entropy(model(x).float(), y)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _scaled(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=25)
    data = batches(64, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        inputs, classes = next(data)
        with torch.autocast("cpu", torch.float16):
            loss = _entropy(model(inputs).float(), classes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # made or skipped: a scale that grows until it overflows is how a scaler works
        scaler.update()
        run.step(loss)


def _resumed_noise(run: Run) -> None:
    x, y = curve(1000, noise=0.3)
    model = mlp(8, 32, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    objective = over(batches(64, x, y), lambda x, y: _square(model(x), y))
    train_before(optimizer, objective, 1500)
    fit(run, model, optimizer, objective)


def _resumed_exact(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    objective = over(batches(128, x, y), lambda x, y: _entropy(model(x), y))
    train_before(optimizer, objective, 1200)
    fit(run, model, optimizer, objective)


def _adversarial(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_entropy(model(x), y), x)
        return _entropy(model(x.detach() + 0.1 * slope.sign()), y)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _mixup(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        share, other = torch.rand(()), torch.randperm(len(x))
        logits = model(share * x + (1 - share) * x[other])
        return share * _entropy(logits, y) + (1 - share) * _entropy(logits, y[other])

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _focal(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        each = _entropy(model(x), y, reduction="none")
        return ((1 - (-each).exp()) ** 3 * each).mean()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _new_aim(run: Run) -> None:
    x, y = digits()
    model = _Heads(mlp(64, 64, 32), 32, 10, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    data = batches(64, x, y)

    def loss() -> Tensor:
        inputs, classes = next(data)
        wrong = _entropy(model(inputs, 0), classes)
        return wrong if run.made < 150 else wrong + 10 * _square(model(inputs, 1), inputs)

    fit(run, model, optimizer, loss)


def _shifted(run: Run) -> None:
    x, y = curve(2000, noise=0.05)
    model = mlp(8, 64, 64, 1, act=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    data = batches(64, x, y)

    def loss() -> Tensor:
        inputs, targets = next(data)
        season = run.made // 75  # the world changes four times, and is learned anew each time
        return _square(model(inputs.roll(season, 1)), targets + 0.5 * season)

    fit(run, model, optimizer, loss)


PROGRAMS: tuple[Program, ...] = (
    healthy(
        "logistic regression from zeros", _logistic, "All weights start at zero, so each step is huge beside them."
    ),
    healthy(
        "linear regression, ill-conditioned", _ill_conditioned, "The slow directions make it look stalled at once."
    ),
    healthy(
        "regression by LBFGS", _lbfgs, "Line searches make steps of very unequal size; then nothing is left to do.", 120
    ),
    healthy("targets near 100", _large_targets, "The loss starts at 1e4 and the last bias grows a hundredfold."),
    healthy(
        "summed squared error", _summed, "Sums over 512 rows make gradient norms of hundreds and thousands, and stable."
    ),
    healthy(
        "parity of three bits", _parity, "A plateau at chance, tiny gradients, then a sudden drop with large ones."
    ),
    healthy(
        "truth table of four bits",
        _xor_table,
        "A long plateau, then a sudden drop towards a loss of almost nothing.",
        400,
    ),
    healthy("exact linear fit", _exact_fit, "Loss and gradients fall to rounding error because it is solved."),
    healthy("autoencoder of rank three", _autoencoder, "The loss falls by orders of magnitude, the gradients with it."),
    healthy(
        "Gaussian likelihood", _gaussian, "The loss turns negative and its gradients grow as the variance shrinks."
    ),
    healthy("digits, batch of two", _batch_of(2, 0.05), "Loss and gradients jump by tens from step to step.", 400),
    healthy(
        "digits, batch of one", _batch_of(1, 0.03), "Most steps have a gradient near zero, and some a large one.", 400
    ),
    healthy("digits with heavy dropout", _dropout, "Half of each layer is off, so that the loss stays noisy."),
    healthy("cyclical rate", _cyclical, "The rate rises 20-fold again and again, and the loss with it a little."),
    healthy("warm restarts", _restarts, "At each restart the rate jumps and loss and gradients rise for a while."),
    healthy(
        "one cycle", _one_cycle, "The rate climbs for a third of the run, then falls to nothing, and updates with it."
    ),
    healthy("from three classes to ten", _curriculum, "At step 100 seven unseen classes arrive and the loss jumps."),
    healthy("gradual unfreezing", _unfreezing, "Layers have no gradient until they are unfrozen, one by one."),
    healthy("frozen random backbone", _frozen, "Four of eight tensors never have a gradient nor move."),
    healthy(
        "low-rank adapters, SGD", _lora(torch.optim.SGD, lr=0.02), "B starts at zero, so A has no gradient at step 0."
    ),
    healthy(
        "low-rank adapters, Adam",
        _lora(torch.optim.Adam, lr=0.005),
        "B starts at zero, so its first steps are huge beside it.",
    ),
    healthy("heads used now and then", _rare_heads, "Heads have gradients that are exactly zero in most steps."),
    healthy(
        "two tasks by turns", _alternating, "Every other step has a loss many times as large, and other heads.", 400
    ),
    healthy("weight decay", _decayed, "Weights shrink for most of the run and the loss settles above zero."),
    healthy("label smoothing", _smoothed, "The loss stalls near 0.9, its least possible value."),
    healthy("batch of 1024", _large_batch, "A high rate with warm-up, then gradients of almost nothing."),
    healthy("accumulated gradients", _accumulated, "Eight backwards go before each step."),
    healthy("clipped by the user", _clipped, "Every gradient before the clip is beyond its limit for a long time."),
    healthy(
        "rare features, Adagrad", _adagrad, "Most inputs are zero, and the effective rate starts high and dies away."
    ),
    healthy("rings with Nesterov", _nesterov, "Momentum of 0.95 overshoots and swings before it settles."),
    healthy("small conv net, RMSprop", _rmsprop, "The first steps of RMSprop are ten times as large as the rest."),
    healthy("weight norm", _weight_norm, "Direction and length are tensors of their own, with unlike gradients."),
    healthy("spectral norm", _spectral_norm, "The raw weights drift freely, for only their direction counts."),
    healthy(
        "conv net with batch norm", _batch_norm, "Scale-free weights have gradients that change with their length."
    ),
    healthy(
        "conv net with group norm, batch of 8", _group_norm, "Small batches and a rate that is high for AdamW.", 400
    ),
    healthy(
        "residual branches from zero",
        _zero_residual,
        "Half of each branch has no gradient at first, for its end is zero.",
    ),
    healthy(
        "hinge loss", _hinge, "Once all margins are met the loss and the gradients are exactly zero in many steps."
    ),
    healthy(
        "one label in five drawn by lot",
        _noisy_labels,
        "The loss stalls above 1, with large gradients: the noise is not learnable.",
    ),
    healthy(
        "one positive in fifty",
        _imbalanced,
        "Batches without a positive have almost no gradient, the others a large one.",
    ),
    healthy("heavy-tailed noise, Huber", _heavy_tailed, "Outliers keep the loss jumping."),
    healthy(
        "heavy-tailed noise, squared",
        _heavy_tailed_square,
        "Now and then one row makes a loss tens of times the usual.",
    ),
    healthy("quantiles", _quantile, "Gradients do not shrink near the optimum, for the loss has kinks."),
    healthy("counts", _poisson, "The Poisson likelihood is far below zero and its first gradients are large."),
    healthy("rate cut tenfold, twice", _step_decay, "At each cut loss and updates drop at once."),
    healthy("deep tanh net", _deep_tanh, "Six tanh layers, which may saturate and lose their gradients."),
    healthy("bfloat16 autocast", _bfloat, "Gradients are coarse, and many equal."),
    healthy(
        "float16 with a loss scaler", _scaled, "The scale grows until a step overflows and is skipped, as it should."
    ),
    healthy("resumed at the noise floor", _resumed_noise, "The loss does not fall at all: it had converged before."),
    healthy("resumed when solved", _resumed_exact, "Loss and gradients are almost nothing from the first step."),
    healthy("adversarial training", _adversarial, "Each batch is made worse on purpose, and needs two backwards."),
    healthy("mixed rows", _mixup, "The loss swings with the share that is mixed in, and stays high."),
    healthy("focal loss", _focal, "Rows that are learned count for almost nothing, so gradients vanish."),
    healthy(
        "an aim added midway", _new_aim, "At step 150 another loss is added and a head wakes that had no gradient."
    ),
    healthy("a world that changes", _shifted, "Four times the loss jumps, because the data do, and is learned again."),
)
