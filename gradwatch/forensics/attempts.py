"""The ways to look for an origin. Each returns what it finds, or remembers why it has found nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.errors import words_of
from gradwatch.forensics.explain import called_at, origin_of, sole
from gradwatch.forensics.graph_walk import LossGraph
from gradwatch.forensics.loss_again import LossAgain
from gradwatch.forensics.names import OUTPUT, Names, tensors_in
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.replay import Repeat, Replay, batch_of, first_cause, is_faithful, know_rows
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.statements import Backward
    from gradwatch.records import Origin, Part, Way

OTHER_RESULT = "the repeated forward gave another result"
_NOT_KEPT = "the inputs of the model were not kept in this step (forensics=True keeps those of each step)"


class Attempts:
    """Repeats a forward, computes a loss again, or walks its graph.

    Args:
        model: the model.
        calls: its forwards in this step.
        backward: where the program has called backward; None if that is not known.
        may_run: whether the statements of the loss may be run again.
        batch: batch that the user has named; None if there is none.

    Attributes:
        guilty: the forward in question; None if it is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        backward: Backward | None,
        batch: Any = None,
        *,
        may_run: bool = False,
    ) -> None:
        self._model = model
        self._calls = calls
        self._backward = backward
        self._given = batch
        self._may_run = may_run
        self.guilty: Call | None = calls[0] if len(calls) == 1 else None
        self._reasons: list[str] = []
        self._overflowed: list[tuple[Tensor, Mark]] = []  # weights that FSDP2 has cast beyond the range of their dtype
        self._silent: Origin | None = None  # infinities that a forward has written on purpose, if it has made no others

    def _repeat(self, call: Call, gradients: list[Tensor | None] | None = None) -> tuple[Origin, bool | None] | None:
        """Return what repeating a forward finds, and whether it was faithful; None if it finds nothing."""
        try:
            repeat = Repeat(self._model, call, gradients, overflowed=self._overflowed)
            result: Replay = repeat.run()
            mark = first_cause(repeat, result)
            if not result.marks and len(self._calls) == 1:  # gradients of several are added before they are reduced
                mark = result.reduced
            if mark is None or mark.earlier:
                if is_faithful(call, result.outputs) is False:
                    self._reasons.append(OTHER_RESULT)
                elif mark is None and all(one.mute for one in result.marks) and (silent := sole(result.marks)):
                    self._silent = origin_of(silent, "replay", batch=repeat.batch, part="model").repeated(faithful=True)
                elif any(not one.mute for one in result.marks):
                    self._reasons.append("several operations made it, and which of them counts is not known")
                return None
            know_rows(repeat, mark)
            faithful = is_faithful(call, result.outputs)
            if faithful is False:
                self._reasons.append(OTHER_RESULT)
        except CannotRepeatError as reason:
            self._reasons.append(str(reason))
            return None
        except MemoryError:
            self._reasons.append("there was not enough memory to repeat the forward")
            return None
        except RuntimeError as error:
            self._reasons.append(f"the forward could not be repeated ({' '.join(str(error).split())[:200]})")
            return None
        self.guilty = call
        origin = called_at(origin_of(mark, "replay", batch=repeat.batch, part="model"), call.file, call.line)
        return origin.repeated(faithful=faithful), faithful

    def _source(self, *, backward: bool) -> Origin | None:
        """Return what computing the loss again from its source finds; None if it finds nothing or is not understood.

        Only if that was asked for, and if the source is not understood, its statements are run.
        """
        if self._backward is None or not all(call.outputs for call in self._backward.calls):
            return None
        again = LossAgain(self._backward, self._names(), self._batch)
        marks: tuple[Mark, ...] = ()
        way: Way = "source"
        try:
            marks = again.evaluated(backward=backward)
        except Exception as error:
            self._reasons.append(_told("the source of the loss cannot be evaluated", error))
            if self._may_run:
                way = "statements"
                try:
                    marks = again.run(backward=backward)
                except Exception as failure:  # the user's code may raise anything
                    self._reasons.append(_told("the statements of the loss cannot be run again", failure))
        mark = sole(marks)
        if mark is None or mark.earlier or mark.subject in ("weight", "buffer"):
            return None
        if backward and (
            mark.mute or mark.name == OUTPUT
        ):  # only what ran in the backward makes gradients of finite losses
            return None
        return origin_of(mark, way, batch=self._batch, part="loss code")

    def _part_of(self, mark: Mark) -> Part:
        """Return whether a node of the graph was made in a forward of the model."""
        if not mark.order or mark.order < min((one.first for one in self._calls), default=mark.order + 1):
            return "unknown"  # numbers are not known in this version of torch, or the node is older than what was kept
        return "model" if any(one.made(mark.order) for one in self._calls) else "loss code"

    @property
    def _batch(self) -> int:
        return batch_of(self._calls[0].args, self._calls[0].kwargs) if self._calls else 0

    def _names(self) -> Names:
        names = Names(self._model)
        for call in self._calls:
            names.add_inputs(unwrapped(call.module), call.args, call.kwargs)
        if self._given is not None:
            names.add_named(tensors_in(self._given))
        return names

    def _reason(self, last: str, *, of_result: bool = False) -> str:
        """Return why nothing was found; the last reason is left out if it is ``of_result``, but that was not the original's."""
        lasts = [last] if not of_result or OTHER_RESULT not in self._reasons else []
        return "; ".join(dict.fromkeys([*self._reasons, *lasts, *([] if self._calls else [_NOT_KEPT])]))

    def _in_graph(self, losses: list[Tensor], outputs: list[Tensor]) -> Mark | None:
        finite = [one for one in outputs if not is_nonfinite(one)]
        try:
            return LossGraph(losses, finite).origin(self._names(), self._batch)
        except (
            RuntimeError,
            NotImplementedError,
        ) as error:  # a function of the user's, or a checkpoint that is run in a backward
            self._reasons.append(f"the graph of the loss cannot be walked ({error})")
            return None


def _told(what: str, error: Exception) -> str:
    return str(error) if isinstance(error, CannotRepeatError) else f"{what} ({words_of(error)[:200]})"
