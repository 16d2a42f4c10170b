"""Other monitors as users switch them on: from packages where they are installed (extra ``bench``), the rest written here."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from benchmarks.overhead.bench import Bench

Switch = Callable[["Bench"], "AbstractContextManager[None]"]


@contextmanager
def _before_each_step(bench: Bench, act: Callable[[], Any]) -> Iterator[None]:
    bench.before_step = act
    try:
        yield
    finally:
        bench.before_step = None


def item_loop(bench: Bench) -> AbstractContextManager[None]:
    """The loop that people write: one norm read for each parameter."""

    def record() -> None:
        [parameter.grad.norm().item() for parameter in bench.parameters if parameter.grad is not None]

    return _before_each_step(bench, record)


@contextmanager
def detect_anomaly(_: Bench) -> Iterator[None]:
    """Of torch."""
    warnings.filterwarnings("ignore", "Anomaly Detection")
    with torch.autograd.detect_anomaly(check_nan=True):
        yield


def lightning_grad_norm(bench: Bench) -> AbstractContextManager[None]:
    """As its documentation calls it: in `on_before_optimizer_step`."""
    grad_norm = import_module("lightning.pytorch.utilities").grad_norm
    return _before_each_step(bench, lambda: grad_norm(bench.model, norm_type=2))


def composer_optimizer_monitor(bench: Bench) -> AbstractContextManager[None]:
    """What OptimizerMonitor computes with ``only_global=False``: Composer itself does not install beside this torch."""

    def record() -> None:
        norms = {
            name: torch.linalg.vector_norm(parameter.grad)
            for name, parameter in bench.model.named_parameters()
            if parameter.grad is not None
        }
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        {name: norm.item() for name, norm in [*norms.items(), ("global", total)]}

    return _before_each_step(bench, record)


@contextmanager
def debug_underflow_overflow(bench: Bench) -> Iterator[None]:
    """Of transformers: hooks on each module; it has no way off, so they are taken away here."""
    before = {module: dict(module._forward_hooks) for module in bench.model.modules()}
    debug = import_module("transformers.debug_utils").DebugUnderflowOverflow(bench.model)
    try:
        yield
    finally:
        del debug
        for module, hooks in before.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


@contextmanager
def wandb_watch(bench: Bench) -> Iterator[None]:
    """`wandb.watch(model, log_freq=1)` and one `log` for each step, offline."""
    wandb = import_module("wandb")
    with TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        wandb.watch(bench.model, log_freq=1)
        try:
            with _before_each_step(bench, lambda: run.log({"step": 1})):
                yield
        finally:
            wandb.unwatch(bench.model)
            run.finish()


@contextmanager
def stabilityguard(bench: Bench) -> Iterator[None]:
    """Its optimizer in place of the other."""
    own = bench.optimizer
    with TemporaryDirectory() as folder:
        guarded = import_module("stabilityguard").GuardedOptimizer(
            own, bench.model, log_dir=folder, verbose=False, log_every=10**9
        )
        bench.optimizer = guarded
        try:
            yield
        finally:
            bench.optimizer = own
            for module in bench.model.modules():
                module._backward_hooks.clear()
                module._forward_hooks.clear()


@contextmanager
def trainpulse(bench: Bench) -> Iterator[None]:
    """Its hooks for PyTorch."""
    monitor = import_module("trainpulse").Monitor()
    handles = import_module("trainpulse.callbacks").make_pytorch_hooks(bench.model, monitor)
    step = 0

    def count() -> None:
        nonlocal step
        step += 1
        handles[0].set_step(step)

    try:
        with _before_each_step(bench, count):
            yield
    finally:
        for handle in handles:
            handle.remove()


def traintools(bench: Bench) -> AbstractContextManager[None]:
    """`GradientHealthMonitor.inspect` before each step."""
    monitor = import_module("traintools").GradientHealthMonitor()
    return _before_each_step(bench, lambda: monitor.inspect(bench.model, lr=1e-4))


@contextmanager
def gradviz(bench: Bench) -> Iterator[None]:
    """Attached, with a `step` before each of the optimizer's."""
    watcher = import_module("gradviz").GradViz(bench.model)
    watcher.attach()
    try:
        with _before_each_step(bench, watcher.step):
            yield
    finally:
        watcher.detach()


def arc_vigil(bench: Bench) -> AbstractContextManager[None]:
    """`observe` before each step."""
    monitor, step = import_module("arc_vigil").BendexMonitor(bench.model), 0

    def observe() -> None:
        nonlocal step
        step += 1
        monitor.observe(step)

    return _before_each_step(bench, observe)


# name: how it is switched on, and the package that it needs
_ALL: dict[str, tuple[Switch, str]] = {
    "item loop": (item_loop, "torch"),
    "detect_anomaly": (detect_anomaly, "torch"),
    "lightning grad_norm": (lightning_grad_norm, "lightning"),
    "composer OptimizerMonitor": (composer_optimizer_monitor, "torch"),
    "DebugUnderflowOverflow": (debug_underflow_overflow, "transformers"),
    "wandb.watch": (wandb_watch, "wandb"),
    "stabilityguard": (stabilityguard, "stabilityguard"),
    "trainpulse": (trainpulse, "trainpulse"),
    "traintools": (traintools, "traintools"),
    "gradviz": (gradviz, "gradviz"),
    "arc-vigil": (arc_vigil, "arc_vigil"),
}
OTHERS = {name: switch for name, (switch, package) in _ALL.items() if importlib.util.find_spec(package) is not None}
MISSING = [name for name in _ALL if name not in OTHERS]
