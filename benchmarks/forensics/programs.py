"""The programs: each cause in the model and in the code of the loss, and one cause under each way of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.forensics.causes import CAUSES, HEALTHY, MODULE, NARROW, ROWS, WIDTH, Block, Cause, Net

if TYPE_CHECKING:
    from collections.abc import Callable

    Attach = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Program:
    """One training that fails in its first step.

    Attributes:
        name, group: what it is called, and which table it stands in.
        cause: the operation, its direction and rows.
        module: path of the module; None for the code of the loss.
        run: trains; called with a function that it calls with the model before the first step.
        processes: number of processes.
    """

    name: str
    group: str
    cause: Cause | None
    module: str | None
    run: Callable[[Attach], None]
    processes: int = 1


def square(out: Tensor) -> Tensor:
    """Return the mean of the squares."""
    return out.pow(2).mean()


def data() -> Tensor:
    """Return the batch."""
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH)


def in_model(run: Callable[[Tensor], Tensor]) -> Callable[[Attach], None]:
    """Return a training whose model contains an operation."""

    def train(attach: Attach) -> None:
        x = data()
        model = Net(run)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        attach(model)
        out = model(x)
        square(out).backward()
        optimizer.step()

    return train


def in_loss(run: Callable[[Tensor], Tensor]) -> Callable[[Attach], None]:
    """Return a training whose loss contains an operation."""

    def train(attach: Attach) -> None:
        x = data()
        model = nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        attach(model)
        out = model(x)
        loss = run(out).mean()
        loss.backward()
        optimizer.step()

    return train


LOG, SQRT, SOFTMAX = (CAUSES[name] for name in ("log of zero", "sqrt at zero", "softmax of a masked row"))
SETTINGS: list[Program] = []


def setting(
    name: str, cause: Cause = LOG, module: str | None = MODULE, processes: int = 1
) -> Callable[[Callable[[Attach], None]], Callable[[Attach], None]]:
    """Add a way of training."""

    def add(run: Callable[[Attach], None]) -> Callable[[Attach], None]:
        SETTINGS.append(Program(name, "ways of training", cause, module, run, processes))
        return run

    return add


def _step(model: Any, *others: Any) -> tuple[Any, Any]:
    return model, torch.optim.SGD([one for part in (model, *others) for one in part.parameters()], lr=0.01)


@setting("accumulation over three batches, the second fails")
def _accumulated(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(lambda h: LOG.run(h) if bool((h[0] == h[1]).all()) else h))
    attach(model)
    for number in range(3):
        batch = x.clone()
        if number == 1:
            batch[0] = batch[1]
        square(model(batch)).backward()
    optimizer.step()


@setting("autocast")
def _autocast(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(LOG.run))
    attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = square(model(x))
    loss.backward()
    optimizer.step()


@setting("GradScaler")
def _scaler(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(LOG.run))
    scaler = torch.amp.GradScaler("cpu")
    attach(model)
    for _ in range(40):  # a scaler that has left out so many steps does not search for its scale
        optimizer.zero_grad()
        scaler.scale(square(model(x))).backward()
        scaler.step(optimizer)
        scaler.update()


class Checkpointed(nn.Module):
    """The model, with its blocks under a checkpoint."""

    def __init__(self, cause: Cause, *, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(torch.tanh), Block(cause.run)])
        self.head = nn.Linear(WIDTH, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        result: Tensor = self.head(x)
        return result


@setting("checkpoint", SQRT)
def _checkpoint(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Checkpointed(SQRT, reentrant=False))
    attach(model)
    square(model(x)).backward()
    optimizer.step()


@setting("checkpoint, reentrant", SQRT)
def _reentrant(attach: Attach) -> None:
    x = data().requires_grad_()
    model, optimizer = _step(Checkpointed(SQRT, reentrant=True))
    attach(model)
    square(model(x)).backward()
    optimizer.step()


@setting("torch.compile", SQRT)
def _compiled(attach: Attach) -> None:
    x = data()
    model: Any = torch.compile(Net(SQRT.run), backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(model)
    square(model(x)).backward()
    optimizer.step()


@setting("dropout and BatchNorm", SQRT)
def _dropout(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(SQRT.run, nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)))
    attach(model)
    square(model(x)).backward()
    optimizer.step()


class Recurrent(nn.Module):
    """An LSTM, and a block that fails."""

    def __init__(self, cause: Cause) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.2, batch_first=True)
        self.blocks = nn.ModuleList([nn.Identity(), Block(cause.run)])

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.blocks[1](self.lstm(x[:, None].expand(-1, 4, -1))[0][:, -1])
        return result


@setting("LSTM", SOFTMAX)
def _lstm(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Recurrent(SOFTMAX))
    attach(model)
    square(model(x)).backward()
    optimizer.step()


@setting("a closure")
def _closure(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(LOG.run))
    attach(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = square(model(x))
        loss.backward()
        return loss

    optimizer.step(closure)


class Keyed(nn.Module):
    """A model that takes and returns dicts, and computes its loss itself."""

    def __init__(self, cause: Cause) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(torch.tanh), Block(cause.run)])

    def forward(self, *, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Run."""
        out = self.blocks[1](self.blocks[0](inputs))
        return {"loss": (out - labels).pow(2).mean(), "out": out}


@setting("a model that returns its loss", SQRT)
def _own_loss(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Keyed(SQRT))
    attach(model)
    model(inputs=x, labels=torch.zeros(ROWS, WIDTH))["loss"].backward()
    optimizer.step()


@setting("two forwards of one model", SQRT)
def _twice(attach: Attach) -> None:
    x = data()
    model, optimizer = _step(Net(SQRT.run))
    attach(model)
    (square(model(x)) + square(model(x + 1))).backward()
    optimizer.step()


@setting("DistributedDataParallel, 2 processes", SQRT, processes=2)
def _ddp(attach: Attach) -> None:
    x = data()
    model = nn.parallel.DistributedDataParallel(Net(SQRT.run))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(model)
    square(model(x)).backward()
    optimizer.step()


def _sharded(attach: Attach, cause: Cause, dtype: torch.dtype | None = None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x = data()
    model: Any = Net(cause.run)
    policy = MixedPrecisionPolicy(dtype, torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(model)
    square(model(x)).backward()
    optimizer.step()


@setting("FSDP2, 2 processes", processes=2)
def _fsdp2(attach: Attach) -> None:
    _sharded(attach, LOG)


@setting("FSDP2, 2 processes, in the backward", SQRT, processes=2)
def _fsdp2_backward(attach: Attach) -> None:
    _sharded(attach, SQRT)


@setting("FSDP2 in bfloat16, 2 processes, in the backward", SQRT, processes=2)
def _fsdp2_bfloat16(attach: Attach) -> None:
    _sharded(attach, SQRT, torch.bfloat16)


@setting("FSDP2 in float16, 2 processes", NARROW, processes=2)
def _fsdp2_float16(attach: Attach) -> None:
    _sharded(attach, NARROW, torch.float16)


def _library(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


if _library("transformers") and _library("accelerate"):

    @setting("HF Trainer, GPT-2", Cause("bmm", "forward", lambda h: h), "transformer.h.1.attn")
    def _trainer(attach: Attach) -> None:
        import transformers

        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
        )
        model = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight.mul_(1e24)
        attach(model)
        rows = [{"input_ids": torch.arange(8) % 7, "labels": torch.arange(8) % 7} for _ in range(4)]
        _train_with(transformers.Trainer, model, rows, 2)

    @setting("HF Trainer, an overridden compute_loss", module=None)
    def _compute_loss(attach: Attach) -> None:
        import transformers

        class Trainer(transformers.Trainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:  # noqa: FBT001, FBT002
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                loss = LOG.run(outputs["logits"]).mean() + nn.CrossEntropyLoss()(outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        class Classifier(nn.Linear):
            def forward(self, x: Tensor, labels: Any = None) -> dict[str, Tensor]:  # type: ignore[override]  # noqa: ARG002
                return {"logits": super().forward(x)}

        rows = [{"x": one, "labels": torch.tensor(0)} for one in data()]
        model = Classifier(WIDTH, WIDTH)
        attach(model)
        _train_with(Trainer, model, rows, ROWS)

    def _train_with(kind: Any, model: Any, rows: list[dict[str, Tensor]], batch: int) -> None:
        import tempfile

        import transformers

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=batch,
                max_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
            )
            kind(model, arguments, train_dataset=rows).train()


if _library("lightning"):

    def _fit(attach: Attach, net: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> None:
        import logging

        import lightning

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Lit(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch: Any, _: int) -> Tensor:
                loss = loss_of(self.net(batch[0]))
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        module = Lit()
        attach(module.net)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data()), batch_size=ROWS)
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)

    @setting("Lightning", SQRT)
    def _lightning(attach: Attach) -> None:
        _fit(attach, Net(SQRT.run), square)

    @setting("Lightning, the loss in training_step", SQRT, module=None)
    def _training_step(attach: Attach) -> None:
        _fit(attach, nn.Linear(WIDTH, WIDTH), lambda h: SQRT.run(h).mean())


PROGRAMS = [
    *(Program(name, "in the model", cause, MODULE, in_model(cause.run)) for name, cause in CAUSES.items()),
    *(Program(name, "in the code of the loss", cause, None, in_loss(cause.run)) for name, cause in CAUSES.items()),
    *SETTINGS,
    *(Program(name, "healthy", None, MODULE, in_model(run)) for name, run in HEALTHY.items()),
]
