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
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from gradwatch.history.history import History
    from gradwatch.records import Incident


NONE: Mapping[str, Tensor] = {}  # no buffer is known not to have been finite before


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
    constants: Mapping[str, Tensor] = NONE,
) -> Checkpoint:
    """Return whether the model is fit for a checkpoint, as in `gradwatch.Monitor.checkpoint_guard`.

    Args:
        model: model whose parameters and buffers are checked. With several processes they are not read; the answer then
            follows from what all processes know.
        history: history of the run.
        incidents: incidents that are open, or over with damage.
        constants: which buffers may hold infinities (see `constants_of`).
    """
    if device.capturing():
        return Checkpoint("a CUDA graph is being captured, so that no value can be read")
    for one in incidents:
        if not one.speaks_against_run:
            continue
        if one.open:
            told = "".join(f"; {line}" for line in one.left)
            return Checkpoint(
                f"an incident has been open since step {one.opened_step}: {one.kind}, {one.severity}{told}"
            )
        return Checkpoint(f"the incident of step {one.opened_step} is over, with damage: {'; '.join(one.left)}")
    if history.loss_nonfinite:
        return Checkpoint(f"the loss of step {history.row.step} was {history.row.loss}")
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Checkpoint(damage_of(model, constants))
    # use only what all processes know: if their answers differed, a collective save would hang
    return Checkpoint(history.damage_seen)


def damage_without_waiting(model: nn.Module, history: History, constants: Mapping[str, Tensor] = NONE) -> str:
    """Return the same as `damage_of`; where the model is on a device, what its rows have said last."""
    # of parts, a process knows its own alone
    if all(device.reading_is_free(one.device) and not is_partitioned(one) for one in model.parameters()):
        return damage_of(model, constants)
    return history.damage_seen


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """Return by name whether each buffer holds infinity now, before the run: a causal mask of minus infinity is no damage.

    A buffer that holds NaN is. The values are bool tensors of shape (); nothing is read on the host.
    """
    found = ((names, torch.isinf(norms).unbind()) for names, norms in _norms_of_buffers(model))
    return {name: one for names, infinite in found for name, one in zip(names, infinite, strict=True)}


def damage_of(model: nn.Module, constants: Mapping[str, Tensor] = NONE) -> str:
    """Return a description of the first parameter or buffer that holds NaN or Inf; empty if all but ``constants`` are finite.

    Reads the tensors on the host.
    """
    found = (_damage_in(kind, name, tensor, constants) for kind, name, tensor in _tensors(model))
    return next(filter(None, found), "")


def damage_of_buffers(model: nn.Module, constants: Mapping[str, Tensor]) -> str:
    """Return the same as `damage_of`, for buffers alone."""
    buffers = _measurable(unwrapped(model).named_buffers())
    return next(filter(None, (_damage_in("buffer", name, tensor, constants) for name, tensor in buffers)), "")


def _damage_in(kind: str, name: str, tensor: Tensor, constants: Mapping[str, Tensor]) -> str:
    if math.isfinite(norm_of(tensor)):
        return ""
    nans, infs, _ = count_nonfinite(tensor)
    excused = kind == "buffer" and name in constants and bool(constants[name])
    if not nans and (not infs or excused):  # the norm of finite elements may overflow
        return ""
    return f"{kind} {plain_name(name)} holds {nans} NaN and {infs} infinite of {tensor.numel()} elements"


def buffers_are_bad(model: nn.Module, home: torch.device, constants: dict[str, Tensor]) -> Tensor:
    """Return whether a buffer in this process is not finite, as a bool tensor of shape (); nothing is read on the host.

    Buffers that the model did not have before are added to ``constants`` as they are: a mask may be made with the first batch.
    """
    fine = [torch.ones((), dtype=torch.bool, device=home)]
    for names, norms in _norms_of_buffers(model):
        if not constants.keys() >= set(names):
            news = zip(names, torch.isinf(norms), strict=True)
            constants.update((name, one) for name, one in news if name not in constants)
        excused = torch.stack([device.moved(constants[name], norms.device) for name in names])
        fine.append(device.moved((torch.isfinite(norms) | (excused & torch.isinf(norms))).all(), home))
    return ~torch.stack(fine).all()


def _norms_of_buffers(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the names of buffers of one device and dtype, and a norm of each in this process, shape (n,).

    It is NaN or infinite where an element is; the L2 norm, which is by far the fastest on the CPU, also where it overflows.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, tensor in _measurable(unwrapped(model).named_buffers()):
        if tensor.layout is torch.strided and (own := local_of(tensor)).numel():
            real = torch.view_as_real(own.resolve_conj()) if own.is_complex() else own
            kinds.setdefault((real.device, real.dtype), []).append((name, real))
    for together in kinds.values():
        names, tensors = zip(*together, strict=True)
        order = 2 if tensors[0].is_cpu else torch.inf
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        yield list(names), torch.stack(torch._foreach_norm(list(tensors), order, dtype=wide))


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    model = unwrapped(model)
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        yield from ((kind, name, one) for name, one in _measurable(named))


def _measurable(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    held = ((name, part_of(one) if is_partitioned(one) else one.detach()) for name, one in named)
    numbers = ((name, one) for name, one in held if one.is_floating_point() or one.is_complex())
    # other tensors cannot be measured; raising for them would cost the user the checkpoint
    return (one for one in numbers if not one[1].is_meta and unfit(one[1]) is None)
