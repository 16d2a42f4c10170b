"""Trainings under DeepSpeed in two processes: what gradwatch saw, and what DeepSpeed's own calls say.

Run as ``python -m tests.torchrun 2 tests.frameworks.deepspeed_runs FOLDER``. Just before each step, `safe_get_full_grad` and
`safe_get_full_fp32_param` gather whole gradients and weights, whose norms in float64 are the truth.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU too

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

import gradwatch
from tests.trainings import data

if TYPE_CHECKING:
    from collections.abc import Iterator

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a sum for inference alone, which would be compiled
mse = nn.functional.mse_loss
STEPS = 6
LR = 0.05


MORE: dict[str, dict[str, Any]] = {
    "persistent": {"stage3_param_persistence_threshold": 100},  # so that some layers are divided and some are not
    "round robin": {"round_robin_gradients": True},
    "overlapped": {"overlap_comm": True, "reduce_bucket_size": 200},
}


@dataclass(frozen=True)
class Setup:
    """A training.

    Args:
        name: its name.
        stage: stage of ZeRO.
        bf16: bfloat16 parameters, instead of float32.
        accumulate: number of backwards for each step.
        event: what goes wrong in it.
        clip: the clip of auto-clip.
        more: further settings of DeepSpeed.
    """

    name: str
    stage: int
    bf16: bool = False
    accumulate: int = 1
    event: str = ""
    clip: str | None = None
    more: str = ""


MODES = [
    *[
        Setup(f"stage {stage}, {'bfloat16' if bf16 else 'float32'}", stage, bf16)
        for stage in range(4)
        for bf16 in (False, True)
    ],
    *[Setup(f"stage {stage}, bfloat16, accumulated in float32", stage, True, 2, more="float32") for stage in (1, 2, 3)],
    *[Setup(f"stage {stage}, accumulation", stage, accumulate=2) for stage in range(4)],
    *[Setup(f"stage {stage}, two parameter groups", stage, more="groups") for stage in (2, 3)],
    *[Setup(f"stage {stage}, a plain backward", stage, accumulate=2, more="plain backward") for stage in (1, 2, 3)],
    *[Setup(f"stage {stage}, parameters of the model attached", stage, more="inner model") for stage in (0, 2, 3)],
    *[Setup(f"stage {stage}, frozen layers", stage, more="frozen") for stage in (2, 3)],
    *[Setup(f"stage {stage}, gradient_clipping", stage, more="clipping") for stage in (0, 1, 3)],
    *[Setup(f"stage {stage}, optimizer on the host", stage, more="offload") for stage in (2, 3)],
    Setup("stage 3, small layers whole", 3, more="persistent"),
    Setup("stage 2, overlapped", 2, accumulate=2, more="overlapped"),
    Setup("stage 3, made inside zero.Init, attached before DeepSpeed", 3, more="init"),
    *[Setup(f"stage {stage}, AdamW", stage, more="AdamW") for stage in (0, 1, 3)],
    Setup("stage 2, attached before DeepSpeed", 2, more="attached first"),
    Setup("stage 3, attached before DeepSpeed", 3, more="attached first"),
]
KINDS = [(0, False), (0, True), (1, False), (1, True), (2, False), (3, False), (3, True)]
EVENTS = [
    *[Setup(f"explodes, stage {stage}, {bf16}", stage, bf16, 1, "explodes", "norm") for stage, bf16 in KINDS],
    *[Setup(f"explodes by value, stage {stage}", stage, False, 1, "explodes", "value") for stage in (1, 2, 3)],
    Setup("explodes, float32 sums", 1, True, 1, "explodes", "norm", "float32"),
    *[Setup(f"nan, stage {stage}, {bf16}", stage, bf16, 1, "nan", "norm") for stage, bf16 in KINDS],
    Setup("nan, accumulation", 2, False, 2, "nan", "norm"),
    Setup("nan, float32 sums", 1, True, 1, "nan", "norm", "float32"),
]
FAILURE = Setup("gradwatch fails", 3, event="gradwatch fails")
ALONE = [Setup(f"alone, stage {stage}", stage) for stage in range(4)]


def plain() -> nn.Sequential:
    """Return the model of all trainings, whose layers do not fall on the borders of fragments."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 13), nn.LayerNorm(13), nn.Linear(13, 1))


def settings(setup: Setup) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # so that small parameters are divided too
    zero |= MORE.get(setup.more, {})
    if setup.more == "offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": setup.accumulate,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.1 if setup.more == "clipping" else 0.0,  # it clips to 1.0 if nothing is said
    }
    if setup.bf16:
        found["bf16"] = {"enabled": True}
    if setup.more == "float32":
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


def batch(setup: Setup, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Return the part of the batch that this process sees."""
    x, y = data(n=512)
    start = (8 * (2 * (step * setup.accumulate + micro) + dist.get_rank())) % 256
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    return x[start : start + 8].to(dtype), y[start : start + 8].to(dtype)


def norm(tensor: Tensor | None) -> float:
    """Return the norm in float64; NaN if there is no tensor."""
    return math.nan if tensor is None else float(tensor.detach().double().norm())


def whole_weights(model: nn.Module) -> list[Tensor]:
    """Return whole weights: the optimizer's own copies where it has some."""
    found = []
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                low = parameter.detach().clone()
            whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else low
        elif getattr(parameter, "_hp_mapping", "none") != "none":
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = parameter
        found.append(whole.detach().clone())
    return found


class Traffic:
    """Counts the collectives of torch."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce")

    def __enter__(self) -> Counter[str]:
        self.counts: Counter[str] = Counter()
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self.counts

    def _counting(self, name: str, original: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return original(*args, **kwargs)

        return counting

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


class Truth:
    """What DeepSpeed's own calls say of a training, whose collectives are not counted."""

    def __init__(self, model: nn.Module, counts: Counter[str]) -> None:
        self._model, self._counts = model, counts
        self._weights: list[Tensor] = []
        self.grads: list[list[float]] = []
        self.weights: list[list[float]] = []
        self.losses: list[float] = []
        self.moves: list[float] = []

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        before = self._counts.copy()
        yield
        self._counts.clear()
        self._counts.update(before)

    def before_step(self, loss: float) -> None:
        """Gather gradients and weights, and average the loss."""
        with self._uncounted():
            gradients = [safe_get_full_grad(one) if one.requires_grad else None for one in self._model.parameters()]
            self.grads.append([norm(one) for one in gradients])
            self._weights = whole_weights(self._model)
            self.weights.append([norm(one) for one in self._weights])
            together = torch.tensor([loss])
            dist.all_reduce(together)
            self.losses.append(together.item() / dist.get_world_size())

    def after_step(self) -> None:
        """Measure how far the step has moved the weights."""
        with self._uncounted():
            now = whole_weights(self._model)
        moved = [norm(one - then) for one, then in zip(now, self._weights, strict=True)]
        self.moves.append(math.sqrt(sum(one**2 for one in moved)))


def engine_for(setup: Setup, model: nn.Module) -> Any:
    """Return a DeepSpeed engine with plain SGD, so that the length of a step tells the gradient that made it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Any = trained
    if setup.more == "groups":
        groups = [{"params": trained[:3]}, {"params": trained[3:], "lr": LR / 2}]
    optimizer: Any = torch.optim.SGD(groups, lr=LR)
    if setup.more == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings(setup), model_parameters=trained
    )[0]


def backward(setup: Setup, engine: Any, step: int) -> float:
    """Make the backwards of a step; return the loss that they have together."""
    total = 0.0
    for micro in range(setup.accumulate):
        x, y = batch(setup, step, micro)
        if setup.event == "nan" and step == 3 and dist.get_rank() == 1:
            x = x * math.nan
        loss = mse(engine(x), y)
        if setup.event == "explodes" and step >= 20:
            loss = loss * 4.0 ** min(step - 20, 10)
        total += loss.item() / setup.accumulate
        if setup.more == "plain backward":
            loss.backward()
        else:
            engine.backward(loss)
        if micro < setup.accumulate - 1:
            engine.step()
    return total


def of_steps(optimizer: Any) -> tuple[Any, ...]:
    """Return what gradwatch changes of an optimizer while it watches."""
    return type(optimizer).step, vars(optimizer).get("step"), "overflow" in vars(optimizer)


def train(setup: Setup, *, watch: bool = True, look: bool = True) -> dict[str, Any]:
    """Train; return what was seen."""
    outer = (
        deepspeed.zero.Init(config_dict_or_path=settings(setup)) if setup.more == "init" else contextlib.nullcontext()
    )
    with outer:
        model = plain()
    if setup.more == "frozen":
        model[2].requires_grad_(False)
    policy = gradwatch.AutoClip(setup.clip, hold=5) if setup.clip else None
    strict = setup.event != "gradwatch fails"
    first = (
        gradwatch.attach(model, clip=policy, report=None, strict=True)
        if setup.more in ("attached first", "init")
        else None
    )
    engine = engine_for(setup, model)
    untouched = of_steps(engine.optimizer)
    monitor = first
    if watch and first is None:
        inner = setup.more == "inner model"
        watched, optimizer = (model, None) if inner else (engine, engine.optimizer)
        monitor = gradwatch.attach(watched, optimizer, clip=policy, report=None, strict=strict)
    with Traffic() as counts:
        truth = Truth(model, counts)
        for step in range({"nan": 8, "explodes": 40}.get(setup.event, STEPS)):
            loss = backward(setup, engine, step)
            if look:
                truth.before_step(loss)
            if setup.event == "gradwatch fails" and step == 3 and dist.get_rank() == 1 and monitor is not None:
                monitor._probe.recorder._sampling.take = None  # type: ignore[method-assign, assignment]
            engine.step()
            if look:
                truth.after_step()
    if monitor is not None:
        monitor.detach()
    seen = {
        "truth": {name: getattr(truth, name) for name in ("grads", "weights", "losses", "moves")},
        "optimizer": type(engine.optimizer).__name__,
        "restored": of_steps(engine.optimizer) == untouched,
        "counts": dict(counts),
        "skipped steps": engine.skipped_steps,
        "scheduled": engine.lr_scheduler.last_epoch,
        "parameters": [one.double().flatten().tolist() for one in whole_weights(model)],
        "names": [name for name, _ in model.named_parameters()],
    }
    engine.destroy()
    return seen | _seen(monitor) if monitor is not None else seen


def _seen(monitor: gradwatch.Monitor) -> dict[str, Any]:
    history = monitor.history
    return {
        "layers": list(history.layers),
        "norms": history.grad_norm().tolist(),
        "global": history.global_norm().tolist(),
        "losses": history.loss().tolist(),
        "weights": history.weight_norm().tolist(),
        "coefficients": history.clip_coefficient().tolist(),
        "skipped": history.skipped().tolist(),
        "family": history.row.family,
        "rate": history.rate.tolist(),
        "clipped": history.provenance.clipped,
        "processes": history.provenance.processes,
        "incidents": [[i.kind, i.opened_step, list(i.ranks), list(i.evidence), str(i.clip)] for i in monitor.incidents],
        "notes": monitor.notes,
    }


def accelerated(stage: int) -> dict[str, Any]:
    """Train the same under Accelerate, where the engine steps inside `Accelerator.backward`."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    setup = Setup("", stage, accumulate=2)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes several here
    plugin = DeepSpeedPlugin(hf_ds_config=settings(setup))
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=setup.accumulate, cpu=True)
    model = plain()
    engine, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    monitor = gradwatch.attach(engine, optimizer, report=None, strict=True)
    for step in range(STEPS):
        for micro in range(setup.accumulate):
            x, y = batch(setup, step, micro)
            with accelerator.accumulate(engine):
                accelerator.backward(mse(engine(x), y))
                optimizer.step()
                optimizer.zero_grad()
    monitor.detach()
    return _seen(monitor)


def under_the_trainer(stage: int) -> dict[str, Any]:
    """Train under transformers' Trainer; return what was seen and what the Trainer logged."""
    import tempfile

    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    from gradwatch.integrations.huggingface import GradwatchCallback

    AcceleratorState._reset_state(reset_partial_state=True)

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": mse(self.net(x), labels)}

    x, y = data(n=2 * 8 * 2 * STEPS)
    rows = [{"x": one, "labels": target} for one, target in zip(x, y, strict=True)]
    config = settings(Setup("", stage, accumulate=2))
    callback = GradwatchCallback(strict=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            use_cpu=True,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            learning_rate=LR,
        )
        trainer = Trainer(model=Squares(), args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
    assert callback.monitor is not None
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return _seen(callback.monitor) | {
        name: [float(log[name]) for log in logs]
        for name in ("grad_norm", "loss", "gradwatch/global_norm")
        if name in logs[0]
    }


def damaged() -> str:
    """Return what the guard of checkpoints says of a model whose empty parameters hide a NaN, under stage 3."""
    engine = engine_for(Setup("", 3), plain())
    monitor = gradwatch.attach(engine, report=None, strict=True)
    backward(Setup("", 3), engine, 0)
    engine.step()
    well = monitor.checkpoint_guard().reason
    next(engine.module.parameters()).ds_tensor.view(-1)[0] = math.nan
    reason = monitor.checkpoint_guard().reason
    monitor.detach()
    engine.destroy()
    return well or reason


def refused() -> list[str]:
    """Return what is said where something cannot be done: a clip of whole layers, of offloaded gradients, another order."""
    said = []
    for more, clip in (("", gradwatch.ClipAGC()), ("offload", gradwatch.ClipNorm()), ("round robin", None)):
        engine = engine_for(Setup("", 2, more=more), plain())
        try:
            gradwatch.attach(engine, clip=clip, report=None)
        except gradwatch.errors.UsageError as error:
            said.append(str(error))
        engine.destroy()
    return said


def see() -> dict[str, Any]:
    """Make all trainings."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        if dist.get_world_size() == 1:
            return {setup.name: train(setup) for setup in ALONE} | {"damaged": damaged()}
        for setup in [*MODES, *EVENTS, FAILURE]:
            found[setup.name] = {**train(setup), "setup": asdict(setup)}
        for stage in range(4):
            setup = Setup("", stage)
            quiet = train(setup, watch=False, look=False)
            loud = train(setup, look=False)
            found[f"traffic, stage {stage}"] = {
                "alone": quiet["counts"],
                "watched": loud["counts"],
                "same": quiet["parameters"] == loud["parameters"],
            }
        found["refused"] = refused()
        for stage in (2, 3):
            found[f"accelerated, stage {stage}"] = accelerated(stage)
            found[f"under the Trainer, stage {stage}"] = under_the_trainer(stage)
    return found
