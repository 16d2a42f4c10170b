"""Two processes that train together under each trainer, all run once; each leaves what its monitor saw.

Run as ``python -m tests.torchrun 2 tests.frameworks.together FOLDER``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch as pl
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from gradwatch.integrations.accelerate import GradwatchMonitor
from gradwatch.integrations.huggingface import GradwatchCallback as HuggingFace
from gradwatch.integrations.lightning import GradwatchCallback as Lightning

mse = nn.functional.mse_loss
STEPS, SURGE, BATCH, RATE = 90, 70, 4, 0.05


def data() -> torch.utils.data.TensorDataset:
    """What both processes share out among themselves."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * BATCH * STEPS, 6, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))


def network() -> nn.Sequential:
    """A small network with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))


def rate(step: int) -> float:
    """The rate, which is far too high at the end."""
    return 1e3 if step >= SURGE else RATE


def seen(monitor: Any, steps: int, **more: Any) -> dict[str, Any]:
    """What a process leaves: its rows and its verdict."""
    history = monitor.history
    rows = {"loss": history.loss().tolist(), "norm": history.global_norm().tolist()}
    return rows | {"steps": steps, "verdict": monitor.verdict, "attached": monitor.attached} | more


def sharding() -> accelerate.Accelerator:
    """An accelerator that shards (FSDP2). On the CPU, Accelerate leaves that out unless its state says that it is on."""
    accelerate.state.AcceleratorState._reset_state()
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (accelerate.PartialState(), accelerator.state):
        state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def with_accelerate(folder: Path, *, sharded: bool = False) -> dict[str, Any]:
    """A loop with an accelerator, which saves halfway."""
    accelerator = sharding() if sharded else accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=RATE), torch.utils.data.DataLoader(data(), batch_size=BATCH)
    )
    steps = 0
    with GradwatchMonitor(accelerator, model, report=None, strict=True, stop_on="confirmed") as watched:
        for inputs, targets in loader:
            optimizer.param_groups[0]["lr"] = rate(steps)
            accelerator.backward(mse(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == 40:
                accelerator.save_state(str(folder / "saved"))
            if watched.should_stop:
                break
        worth, monitor = watched.is_worth_saving(), watched.monitor
        rows = seen(monitor, steps)
        accelerator.load_state(str(folder / "saved"))
        restored = monitor.state_dict()["step"]
    parameters = {type(one).__name__ for one in model.parameters()}
    return rows | {"worth": worth, "attached": monitor.attached, "restored": restored, "parameters": sorted(parameters)}


class Regression(nn.Module):
    """The network as the Trainer of transformers wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch."""
        return {"loss": mse(self.net(x), y)}


class Surge(transformers.TrainerCallback):  # type: ignore[misc]
    """Sets the rate of each step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(state.global_step)


def with_transformers(folder: Path) -> dict[str, Any]:
    """The Trainer of transformers, which has both processes save at step 80."""
    callback = HuggingFace(report=None, strict=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        optim="sgd",
        max_grad_norm=0.0,
        save_steps=40,
        save_strategy="steps",
        logging_steps=5,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    trainer = transformers.Trainer(
        model=Regression(),
        args=args,
        train_dataset=data(),
        callbacks=[callback, Surge()],
        data_collator=lambda pairs: {"x": torch.stack([x for x, _ in pairs]), "y": torch.stack([y for _, y in pairs])},
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    kept = sorted(one.name for one in folder.glob("checkpoint-*"))
    return seen(
        callback.monitor, trainer.state.global_step, kept=kept, saved=(folder / kept[0] / "gradwatch.json").exists()
    )


class Module(pl.LightningModule):  # type: ignore[misc]
    """The network as Lightning wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch."""
        self.optimizers().param_groups[0]["lr"] = rate(self.global_step)
        return mse(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the plainest optimizer."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Sharded(Module):
    """The same, of which each process holds a part (FSDP2)."""

    def configure_model(self) -> None:
        """Shard the network."""
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def with_lightning(folder: Path, *, stop: bool, sharded: bool = False) -> dict[str, Any]:
    """The Trainer of Lightning, which either ends or saves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = Lightning(report=None, strict=True, stop_on="confirmed" if stop else None)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1) if sharded else "ddp",
        logger=CSVLogger(folder),
        log_every_n_steps=5,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=40)],
    )
    share: Any = torch.utils.data.DistributedSampler(data(), shuffle=False)  # Lightning's own would shuffle
    trainer.fit(
        Sharded() if sharded else Module(), torch.utils.data.DataLoader(data(), batch_size=BATCH, sampler=share)
    )
    steps = trainer.global_step
    dist.barrier()
    kept = sorted(one.name for one in folder.glob("*.ckpt"))
    return seen(callback.monitor, steps, kept=kept)


def see() -> dict[str, Any]:
    """Train under each of them."""
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    os.environ["TORCHELASTIC_RUN_ID"] = "1"  # by which Lightning knows that it need not start the others
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    root = Path(str(folder[0]))
    for name in ("transformers", "stops", "saves", "sharded", "accelerate", "accelerate sharded"):
        (root / name).mkdir(exist_ok=True)
    return {
        "accelerate": with_accelerate(root / "accelerate"),
        "transformers": with_transformers(root / "transformers"),
        "lightning stops": with_lightning(root / "stops", stop=True),
        "lightning saves": with_lightning(root / "saves", stop=False),
        "lightning sharded": with_lightning(root / "sharded", stop=True, sharded=True),
        "accelerate sharded": with_accelerate(root / "accelerate sharded", sharded=True),
    }
