"""What auto-clip decides: about a step that was judged, and in advance about one that is not known yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.autoclip.guard import Guard
    from gradwatch.clips import Clip


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with this step before the optimizer makes it.

    ``rate`` is a factor on its learning rates, ``guard`` what goes beyond the clip.
    """

    clip: Clip | None = None
    skip: bool = False
    rate: float = 1.0
    guard: Guard | None = None


NOTHING = Decision()


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What to do with a step before any rule has seen it: for gradients on a device, whose rows arrive steps later.

    ``clip``: on each step, for auto-clip is on. ``reserve``: where the step surges: the global norm above ``far`` times
    the typical one, or above ``surge`` times beside a loss above ``loss_ceiling``. ``skip``: a step that is not finite.
    ``skip_above``: a step whose global norm is larger. ``rate``: a factor on the learning rates.
    """

    clip: Clip | None = None
    reserve: Clip | None = None
    skip: bool = False
    surge: float = math.inf
    far: float = math.inf
    loss_ceiling: float = math.inf
    skip_above: float = math.inf
    rate: float = 1.0
