"""Check whether a model is fit for a checkpoint, so that a broken model never overwrites a good one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from gradwatch import device
from gradwatch.measure.deepspeed import is_partitioned, part_of
from gradwatch.measure.norms import count_nonfinite, norm_of, unfit
from gradwatch.measure.wrappers import local_of, plain_name, unwrapped

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torch import Tensor, nn

    from gradwatch.history.history import History
    from gradwatch.records import Incident


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The result of a checkpoint guard: true if ``reason``, which says what is wrong with the model, is empty."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def worth_of(
    model: nn.Module,
    history: History,
    incidents: Sequence[Incident],
    *,
    buffers_are_well: bool = True,
    constants: Container[str] = (),
) -> Checkpoint:
    """Return whether the model is fit for a checkpoint, as in `gradwatch.Monitor.checkpoint_guard`.

    Args:
        model: model whose parameters and buffers are checked. With several processes they are not read; the answer then
            follows from what all processes know.
        history: history of the run.
        incidents: incidents that are open, or over with damage.
        buffers_are_well: with several processes, whether all buffers were finite at the last exchange.
        constants: names of buffers that may hold infinities (see `constants_of`).
    """
    if device.capturing():
        return Checkpoint("a CUDA graph is being captured, so that no value can be read")
    for one in incidents:
        if one.severity == "notice":
            continue
        if one.open:
            return Checkpoint(f"an incident has been open since step {one.opened_step}: {one.kind}, {one.severity}")
        return Checkpoint(f"the incident of step {one.opened_step} is over, with damage: {'; '.join(one.left)}")
    if history.loss_nonfinite:
        return Checkpoint(f"the loss of step {history.row.step} was {history.row.loss}")
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Checkpoint(damage_of(model, constants))
    # use only what all processes know: if their answers differed, a collective save would hang
    return Checkpoint(_damage_seen(history, buffers_are_well=buffers_are_well))


def damage_without_waiting(
    model: nn.Module, history: History, *, buffers_are_well: bool, constants: Container[str] = ()
) -> str:
    """Return the same as `damage_of`; where the model is on a device, what its rows have said last."""
    # of parts, a process knows its own alone
    if all(device.reading_is_free(one.device) and not is_partitioned(one) for one in model.parameters()):
        return damage_of(model, constants)
    return _damage_seen(history, buffers_are_well=buffers_are_well)


def _damage_seen(history: History, *, buffers_are_well: bool) -> str:
    """Return a description of what was not finite when rows last looked at weights and buffers; empty if all was."""
    bad = [name for name, hit in zip(history.layers, history.nonfinite_weight, strict=True) if hit]
    if bad:
        return f"parameter {bad[0]} was not finite when it was last checked"
    return "" if buffers_are_well else "a buffer was not finite when it was last checked"


def constants_of(model: nn.Module) -> frozenset[str]:
    """Return the names of the buffers that are not finite now, before the run: a causal mask of minus infinity is no damage."""
    held = ((name, local_of(tensor)) for kind, name, tensor in _tensors(model) if kind == "buffer")
    return frozenset(name for name, own in held if own.numel() and not math.isfinite(norm_of(own)))


def damage_of(model: nn.Module, constants: Container[str] = ()) -> str:
    """Return a description of the first parameter or buffer that holds NaN or Inf; empty if all but ``constants`` are finite.

    Reads the tensors on the host.
    """
    for kind, name, tensor in _tensors(model):
        if name in constants or math.isfinite(norm_of(tensor)):
            continue
        nans, infs, _ = count_nonfinite(tensor)
        if nans or infs:  # the norm of finite elements may overflow
            return f"{kind} {plain_name(name)} holds {nans} NaN and {infs} infinite of {tensor.numel()} elements"
    return ""


def buffers_are_bad(model: nn.Module, home: torch.device, constants: Container[str] = ()) -> Tensor:
    """Return whether a buffer in this process is not finite, as a bool tensor of shape (); nothing is read on the host."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for kind, name, tensor in _tensors(model):
        if (
            kind == "buffer"
            and name not in constants
            and tensor.layout is torch.strided
            and (own := local_of(tensor)).numel()
        ):
            real = torch.view_as_real(own.resolve_conj()) if own.is_complex() else own
            kinds.setdefault((real.device, real.dtype), []).append(real)
    fine = [
        device.moved(torch.isfinite(torch.stack(torch._foreach_norm(together, torch.inf))).all(), home)
        for together in kinds.values()
    ]
    return ~torch.stack(fine).all() if fine else torch.zeros((), dtype=torch.bool, device=home)


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    model = unwrapped(model)
    named = [("parameter", *one) for one in model.named_parameters()] + [
        ("buffer", *one) for one in model.named_buffers()
    ]
    held = ((kind, name, part_of(one) if is_partitioned(one) else one.detach()) for kind, name, one in named)
    numbers = ((kind, name, one) for kind, name, one in held if one.is_floating_point() or one.is_complex())
    # other tensors cannot be measured; raising for them would cost the user the checkpoint
    return (one for one in numbers if not one[2].is_meta and unfit(one[2]) is None)
