"""Models that DeepSpeed trains: which of them cannot be watched, and what this process holds of gradients and weights.

ZeRO reduces gradients into buffers of its own while they arrive, and clears ``grad``. At the optimizer's step a process holds a
fragment of some layers (stages 1 and 2), a part of each layer (stage 3), or all of them (stage 1 with bfloat16 parameters whose
gradients are accumulated in float32). DeepSpeed is not imported here: where the user has not done so, no engine can exist.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    Read = Callable[[], list[Tensor] | None]

OFFLOADED = (
    "DeepSpeed keeps gradients on the host or on disk (offload_optimizer), with norms of its own that no clip changes"
)


def is_engine(model: nn.Module) -> bool:
    """Return whether a model is a DeepSpeed engine."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def engine_of(model: nn.Module) -> Any:
    """Return the DeepSpeed engine that is the model or trains it, as a whole or as a part; None if there is none."""
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is None or isinstance(model, module.DeepSpeedEngine):
        return model if module is not None else None
    kinds = {module.DeepSpeedEngine}
    while more := {kind for one in kinds for kind in one.__subclasses__()} - kinds:
        kinds |= more
    # a module does not refer to its engine; by type, because some objects raise when they are asked for __class__
    engines = [one for one in gc.get_objects() if type(one) in kinds and "module" in one._modules]
    return next((one for one in engines if any(part is model for part in one.module.modules())), None)


def refusal(model: nn.Module) -> str | None:
    """Return why the gradients of a model that DeepSpeed trains cannot be seen; None if they can, or it trains it not."""
    engine = engine_of(model)
    if engine is None:
        return None
    optimizer = engine.optimizer
    parallel = engine.mp_world_size > 1 or engine.has_moe_layers or engine.sequence_parallel_size > 1
    reasons = {
        "its DeepSpeed engine has no optimizer": optimizer is None or type(optimizer).__name__ == "DummyOptim",
        "DeepSpeed's pipeline stages hold different layers": _has_stages(engine),
        "DeepSpeed splits layers over processes by tensor, expert or sequence parallelism": parallel,
        "DeepSpeed scales the loss for float16 (bfloat16 and float32 are watched)": _scales_loss(engine),
        "DeepSpeed's round_robin_gradients puts gradients elsewhere than its own map says": _deals_out(optimizer),
        "DeepSpeed's Muon puts updates in the place of gradients before its step": _has_muon(optimizer),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return reason or (None if isinstance(optimizer, torch.optim.Optimizer) else _unknown(optimizer))


def _has_stages(engine: Any) -> bool:
    return any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__)


def _scales_loss(engine: Any) -> bool:
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    return bool(engine.fp16_enabled()) or any(one is not None for one in scalers)


def _deals_out(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "round_robin_gradients", False))


def _has_muon(optimizer: Any) -> bool:
    return any(group.get("use_muon", False) for group in getattr(optimizer, "param_groups", ()))


def _unknown(optimizer: Any) -> str | None:
    """Return what is not known of an optimizer of DeepSpeed's own; None if all is."""
    name, version = type(optimizer).__name__, getattr(sys.modules.get("deepspeed"), "__version__", "(version unknown)")
    kind = _KINDS.get(name)
    if kind is None:
        return f"DeepSpeed's {name} keeps gradients in buffers of its own"
    missing = [need for need in kind.needs if not hasattr(optimizer, need)]
    return f"the {name} of DeepSpeed {version} has no {missing[0]} (tested with 0.19.8)" if missing else None


def zero_of(model: nn.Module) -> Zero | None:
    """Return what DeepSpeed's own optimizer of a model holds; None if there is none, as in stage 0 with float32."""
    return zero_under(engine_of(model))


def zero_under(engine: Any) -> Zero | None:
    """Return what the own optimizer of a DeepSpeed engine holds; None if there is no engine, or a torch optimizer under it."""
    if engine is None or engine.optimizer is None or isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    kind = _KINDS.get(type(engine.optimizer).__name__)
    return kind(engine) if kind is not None else None


def is_deepspeeds(optimizer: Any) -> bool:
    """Return whether this is an optimizer of DeepSpeed's own, or what Accelerate makes of one."""
    inside = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    return any(type(one).__name__ in _KINDS for one in (optimizer, getattr(inside, "optimizer", None)))


def group_of(model: nn.Module) -> Any:
    """Return the group of the processes among which DeepSpeed divides the batch; None if it does not train the model."""
    engine = engine_of(model)
    return engine.seq_data_parallel_group if engine is not None else None


class Zero:
    """DeepSpeed's optimizer of one model, and what this process holds of gradients and weights. The engine is held weakly.

    The base class is for optimizers that use the whole gradients in ``grad``: those of stage 0 for bfloat16.

    Attributes:
        parameters: the parameters of the optimizer, each with the index of its parameter group.
        hides: True if gradients are in buffers of the optimizer, not in ``grad``.
        spread: True if a process holds parts of gradients.
    """

    needs: tuple[str, ...] = ("zero_grad", "param_groups")
    groups = "fp16_groups"
    hides = spread = False

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        optimizer = engine.optimizer
        groups = getattr(optimizer, self.groups)
        self.parameters: list[tuple[nn.Parameter, int]] = [
            (one, self._group(optimizer, number)) for number, group in enumerate(groups) for one in group
        ]
        self._trained = {id(one) for one, _ in self.parameters}

    @staticmethod
    def _group(_optimizer: Any, number: int) -> int:
        return number

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; None if it no longer exists."""
        engine = self._engine()
        return None if engine is None else engine.optimizer

    @property
    def inner(self) -> Any:
        """The torch optimizer inside, which makes the update; None if it no longer exists."""
        return getattr(self.optimizer, "optimizer", None)

    @property
    def runs_backward(self) -> bool:
        """True inside a call of ``engine.backward``, which divides the loss by the number of accumulated backwards."""
        engine = self._engine()
        return engine is not None and bool(engine._running_engine_backward)

    @property
    def accumulates(self) -> int:
        """The number of backwards for one step, by which DeepSpeed divides gradients."""
        engine = self._engine()
        return 1 if engine is None else int(engine.gradient_accumulation_steps())

    @property
    def clips_to(self) -> float | None:
        """The norm that DeepSpeed itself clips to after the measurement (``gradient_clipping``); None if it does not."""
        return float(getattr(self.optimizer, "clip_grad", 0.0)) or None

    @property
    def offloads(self) -> bool:
        """True if gradients and optimizer state are kept on the host or on disk."""
        return any(bool(getattr(self.optimizer, name, False)) for name in ("cpu_offload", "offload_optimizer"))

    def reader(self, parameters: Iterable[nn.Parameter]) -> Read | None:
        """Return a function that returns the gradients of these parameters as this process holds them at a step.

        The tensors are those that the optimizer will use, so that a change in place acts; a tensor without elements where this
        process holds nothing. The function returns None if there is no gradient. None: gradients are in ``grad``.
        """
        del parameters
        return None

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Return the part of a weight that this process holds: that of the optimizer's own copy if it has one."""
        return parameter

    def parts(self, parameter: nn.Parameter, processes: int) -> tuple[int, int]:
        """Return into how many parts the processes divide the gradient of a parameter, and its weight."""
        del parameter, processes
        return 1, 1

    def discard(self) -> None:
        """Drop the gradients and leave the step out, as DeepSpeed does after an overflow: the engine counts it as skipped."""
        optimizer = self.optimizer
        optimizer.overflow = True
        optimizer._global_grad_norm = float("inf")
        self._drop(optimizer)

    def _drop(self, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)


class _Fragments(Zero):
    """Stages 1 and 2: all gradients and master weights as one vector, of which each process holds a part."""

    needs = (
        "bit16_groups",
        "averaged_gradients",
        "all_grad_tensors",
        "_release_preflattened_grad_buffers",
        "zero_grad",
    )
    groups = "bit16_groups"
    hides = spread = True

    def reader(self, parameters: Iterable[Any]) -> Read:
        places = [(one._hp_mapping, getattr(one, "_index_in_param_group", 0), one.new_empty(0)) for one in parameters]

        def read() -> list[Tensor] | None:
            if all(value is None for value in self._buffers().values()):
                return None
            return [empty if held is None else _fragment(held, index, empty) for held, index, empty in places]

        return read

    def _buffers(self) -> dict[int, Any]:
        optimizer = self.optimizer
        buffers: dict[int, Any] = optimizer.offload_gradient_dict if self.offloads else optimizer.averaged_gradients
        return buffers

    def weight(self, parameter: Any) -> Tensor:
        return _master_of(parameter) if id(parameter) in self._trained else parameter

    def parts(self, parameter: nn.Parameter, processes: int) -> tuple[int, int]:
        return (processes, processes) if id(parameter) in self._trained else (1, 1)

    def _drop(self, optimizer: Any) -> None:
        optimizer.micro_step_id = -1  # as its step does first
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            return
        for number in optimizer.averaged_gradients:
            optimizer.averaged_gradients[number] = None
            optimizer.all_grad_tensors[number] = None


def _fragment(held: Any, index: int, empty: Tensor) -> Tensor:
    buffers = held.offload_gradient_dict if held.use_offload else held.gradient_dict
    group = buffers.get(held.param_group_index)
    return empty if group is None else group[index]


def _master_of(parameter: Any) -> Tensor:
    """Return the fragment of the optimizer's own copy of a weight that this process holds under stages 1 and 2."""
    held = parameter._hp_mapping
    master: Tensor = parameter.new_empty(0) if held is None else held.hp_fragment.detach()
    return master


class _Parts(Zero):
    """Stage 3: each process holds a part of each parameter, of its gradient and of its master weight."""

    needs = (
        *(
            "fp16_groups",
            "averaged_gradients",
            "fp32_partitioned_groups_flat",
            "grad_position",
            "sub_group_to_group_id",
        ),
        *("_pre_step", "_partition_all_parameters", "_overflow_clean_up"),
    )
    hides = spread = True

    @staticmethod
    def _group(optimizer: Any, number: int) -> int:
        group: int = optimizer.sub_group_to_group_id[number]
        return group

    def reader(self, parameters: Iterable[Any]) -> Read:
        optimizer = self.optimizer
        places = {id(one): (i, j) for i, group in enumerate(optimizer.fp16_groups) for j, one in enumerate(group)}
        found = [(*places[id(one)], *self._place(optimizer, one)) for one in parameters]

        def read() -> list[Tensor] | None:
            optimizer = self.optimizer
            if optimizer.offload_optimizer:
                flat = [one.grad for one in optimizer.fp32_partitioned_groups_flat]
                if any(one is None for one in flat):
                    return None
                return [flat[i].narrow(0, start, real) for i, _, start, real in found]
            gradients = optimizer.averaged_gradients
            if not gradients:
                return None
            return [gradients[i][j].narrow(0, 0, real) for i, j, _, real in found]

        return read

    @staticmethod
    def _place(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
        """Return where the part of a parameter begins in its flat group, and how many of its elements are not padding."""
        return optimizer.grad_position[optimizer.get_param_id(parameter)][1], _held(parameter)

    def weight(self, parameter: Any) -> Tensor:
        optimizer = self.optimizer
        if id(parameter) in self._trained and not optimizer._swappable_optimizer_subgroup(
            group := optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        ):
            start, real = self._place(optimizer, parameter)
            master: Tensor = optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, start, real)
            return master
        return part_of(parameter)

    def parts(self, parameter: nn.Parameter, processes: int) -> tuple[int, int]:
        del parameter
        return processes, processes

    def _drop(self, optimizer: Any) -> None:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)


class _WholeInBuffers(Zero):
    """Stage 1 for bfloat16 with gradients in float32: whole gradients in each process, master weights as in stage 1."""

    needs = ("bf16_groups", "fp32_groups_gradients", "clear_hp_grads", "clear_lp_grads")
    groups = "bf16_groups"
    hides = True

    def reader(self, parameters: Iterable[Any]) -> Read:
        optimizer = self.optimizer
        places = {
            id(one): gradient.view(one.shape)
            for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
            for one, gradient in zip(group, gradients, strict=True)
        }
        found = [places[id(one)] for one in parameters]  # which are made once and cleared after each step
        return lambda: found

    def weight(self, parameter: Any) -> Tensor:
        return _master_of(parameter) if id(parameter) in self._trained else parameter

    def parts(self, parameter: nn.Parameter, processes: int) -> tuple[int, int]:
        return 1, processes if id(parameter) in self._trained else 1

    def _drop(self, optimizer: Any) -> None:
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()


_KINDS: dict[str, type[Zero]] = {
    "DeepSpeedZeroOptimizer": _Fragments,
    "DeepSpeedZeroOptimizer_Stage3": _Parts,
    "BF16_Optimizer": _WholeInBuffers,
    "FP16_Optimizer": Zero,
    "FP16_UnfusedOptimizer": Zero,
}


def is_partitioned(tensor: Any) -> bool:
    """Return whether a tensor is a parameter under stage 3, which is empty while it is not in use."""
    return hasattr(tensor, "ds_tensor")


def part_of(parameter: Any) -> Tensor:
    """Return the part of a parameter under stage 3 that this process holds, without padding."""
    part: Tensor = parameter.ds_tensor.detach().view(-1).narrow(0, 0, _held(parameter))
    return part


def _held(parameter: Any) -> int:
    """Return how many elements of a parameter this process holds under stage 3; the rest of its part is padding."""
    length: int = parameter.ds_tensor.ds_numel
    begins = length * dist.get_rank(group=parameter.ds_process_group)
    return int(min(max(parameter.ds_numel - begins, 0), length))
