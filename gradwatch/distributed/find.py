"""Which processes train a model together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gradwatch.distributed.group import Ranks
from gradwatch.measure.deepspeed import group_of
from gradwatch.measure.wrappers import flat_modules, is_dtensor, replica_of

if TYPE_CHECKING:
    from torch import nn

    from gradwatch.measure.layers import Layers


class Unsupported(Exception):  # noqa: N818  it is a finding, reported in a note
    """Raised for a kind of parallel training that cannot be measured as a whole; the message says why."""


def is_first() -> bool:
    """Return True in the process that may draw a live view: rank 0, or the only process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def find_ranks(model: nn.Module, layers: Layers) -> Ranks | None:
    """Return the processes that train ``model``, or None if this process trains it alone.

    Raises:
        Unsupported: several processes run, and it is not known how they share the work.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    group = group_of(model)
    if group is not None:
        return Ranks(layers, group) if dist.get_world_size(group) > 1 else None
    world = dist.get_world_size()
    replica = replica_of(model)
    parameters: list[Any] = [parameter for _, parameter in layers.parameters()]
    meshes = {parameter.device_mesh for parameter in parameters if is_dtensor(parameter)}
    if meshes:
        widest = max(meshes, key=lambda mesh: mesh.size())
        copies = dist.get_world_size(replica.process_group) if replica is not None else 1
        if widest.size() * copies == world:
            return Ranks(layers, None, replica)
        if widest.ndim == 1 and replica is None and len(meshes) == 1:
            return Ranks(layers, widest.get_group())
        raise Unsupported(f"a device mesh {tuple(widest.shape)} among {world} processes has no group of its own")
    flat = flat_modules(model)
    if flat:
        between = getattr(flat[0], "_inter_node_pg", None)  # hybrid: sharded inside a node, replicated between nodes
        whole_world = between is not None and dist.get_world_size(flat[0].process_group) * between.size() == world
        split = 1 if flat[0].sharding_strategy.name == "NO_SHARD" else dist.get_world_size(flat[0].process_group)
        return Ranks(layers, None if whole_world else flat[0].process_group, pieces=split)
    if replica is not None:
        return Ranks(layers, replica.process_group, replica)
    raise Unsupported(f"{world} processes run, but this model uses none of DistributedDataParallel, FSDP, DTensor")
