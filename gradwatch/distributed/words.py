"""What a process tells the others with each row of a step, and what all of them conclude from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.records import Culprits


@dataclass(slots=True)
class Local:
    """What a single process knows of a step, besides norms.

    Args:
        loss: loss of this process; None: no loss was seen.
        word: statement of this process about itself.
        backward_bad: whether its own backward gave gradients that are not finite.
        after: its part of the squared global norm after a clip by value at the previous step.
        buffer_bad: whether a buffer of this process is not finite.
    """

    loss: float | None
    word: Word
    backward_bad: bool = False
    after: float = 0.0
    buffer_bad: bool = False


@dataclass(slots=True)
class Word:
    """What a process states about itself with each row.

    Nothing that only one process knows may decide what is exchanged or done, so all such facts are exchanged.

    Args:
        every: number of optimizer steps that it requests between rows; 0: no request.
        closely: whether it requests close watching, with the weights sampled at each row.
        failed: rules that failed in it, one bit each.
        decided: number that identifies what auto-clip has decided in it so far.
        leaves_out: whether its gradient scaler leaves out this step.
    """

    every: int = 0
    closely: bool = False
    failed: int = 0
    decided: int = 0
    leaves_out: bool = False


@dataclass(slots=True)
class Agreed:
    """What all processes conclude from the words of all processes.

    Args:
        every: largest number of steps that a process requests between rows.
        closely: whether any process requests close watching.
        failed: rules that failed in any process, one bit each.
        parted: ranks whose auto-clip has decided differently from the first process.
        left_out: whether the gradient scalers of all processes leave out the step.
    """

    every: int
    closely: bool
    failed: int
    parted: tuple[int, ...]
    left_out: bool


@dataclass(slots=True)
class United:
    """What all processes know of a step after the exchange.

    Args:
        loss: mean loss of the processes that saw one; None: no process did.
        culprits: processes that non-finite values came from, if only some did.
        after_norm: global norm after a clip by value at the previous step.
        buffer_bad: whether a buffer of any process is not finite.
        agreed: conclusions from the words of all processes.
    """

    loss: float | None
    culprits: Culprits | None
    after_norm: float
    buffer_bad: bool
    agreed: Agreed
