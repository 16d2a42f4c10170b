"""Whether a model is worth a checkpoint, so that a broken one never overwrites a good one."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from torch import distributed as dist

from gradwatch.measure import look_closer, norm_of
from gradwatch.records import EXPLOSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from gradwatch.history import History
    from gradwatch.records import Incident


def is_worth_keeping(model: nn.Module, history: History, incidents: Sequence[Incident]) -> bool:
    """See `gradwatch.Monitor.checkpoint_guard`; ``incidents`` are the open ones."""
    exploding = any(one.kind in EXPLOSION and one.severity != "notice" for one in incidents)
    if exploding or history.loss_nonfinite:
        return False
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return (
            not history.nonfinite_weight.any()
        )  # known to all: were the answers not the same, a shared save would hang
    return all(_is_finite(tensor) for tensor in itertools.chain(model.parameters(), model.buffers()))


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return math.isfinite(norm_of(tensor)) or look_closer(tensor)[:2] == (0, 0)  # a norm may overflow by itself
