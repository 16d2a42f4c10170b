"""One investigation: of a loss, of gradients, or of the inputs of an earlier step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.errors import words_of
from gradwatch.forensics.explain import called_at, origin_of, sole
from gradwatch.forensics.graph_walk import LossGraph, nodes_below
from gradwatch.forensics.loss_again import LossAgain
from gradwatch.forensics.marks import Mark
from gradwatch.forensics.names import OUTPUT, Names, inputs_of, tensors_in
from gradwatch.forensics.operands import has_nan, is_nonfinite, operand_of, rows_of
from gradwatch.forensics.replay import Repeat, Replay, batch_of, first_cause, is_faithful, know_rows
from gradwatch.forensics.spread import fit_whole, whole
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.singular import Singular
    from gradwatch.forensics.statements import Backward
    from gradwatch.records import Origin, Part, Way


_NOT_KEPT = "the inputs of the model were not kept in this step (forensics=True keeps those of each step)"


class NothingFound(Exception):  # noqa: N818  an outcome, not an error
    """Raised with the reason why the operation is not known."""


class Investigation:
    """Looks for the origin of one step.

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
        self._silent: Origin | None = None  # infinities that a forward has written on purpose, if it has made no others

    # A loss that is not finite.

    def of_loss(self, losses: list[Tensor]) -> Origin:
        """Return the origin of losses that are not finite, before their backward.

        Raises:
            NothingFound: it is not known.
        """
        outputs = [one for call in self._calls for one in call.outputs]
        unfaithful = None
        for call in self._calls:
            if call.outputs and not any(map(is_nonfinite, call.outputs)):
                continue  # what the model returned is finite
            if (
                call.outputs
                and not _are_in(call.outputs, losses)
                and not LossGraph(losses, outputs).reaches(call.outputs)
            ):
                continue
            found = self._repeat(call)
            if found is None:
                continue
            origin, faithful = found
            if faithful is not False:
                return origin
            unfaithful = origin
        again = self._source(backward=False)
        if again is not None and again.name == OUTPUT:
            again = self._silent  # what counts is in what the model returned
        if again is not None:
            return again
        mark = self._in_graph(losses, outputs)
        if mark is not None:
            origin = origin_of(mark, "graph", batch=self._batch, part=self._part_of(mark))
            if unfaithful is not None and unfaithful.op == origin.op:
                return unfaithful
            return origin
        raise NothingFound(self._reason("the graph of the loss does not keep enough"))

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

    # Gradients that are not finite.

    def of_gradients(self, singular: Singular) -> Origin:
        """Return the origin of gradients that are not finite although the losses are, after their backward.

        Raises:
            NothingFound: it is not known.
        """
        for call in self._calls:
            gradients = [one.grad if one.retains_grad else None for one in call.outputs]
            known = [one for one in gradients if one is not None]
            if known and not any(map(is_nonfinite, known)):
                found = self._repeat(call, gradients)
                if found is not None and found[1] is not False:
                    return found[0]
            elif not known:
                self._reasons.append("the gradient of the model's output was not kept")
        if (again := self._source(backward=True)) is not None:
            return again
        mark = singular.first(self._names(), self._batch)
        if mark is not None:
            return origin_of(mark, "graph", batch=self._batch, part=self._part_of(mark))
        repeated = "no operation made a non-finite gradient of finite ones when the step was repeated"
        raise NothingFound(self._reason(repeated if self._calls else "the graph of the loss is gone"))

    # A step of all processes together.

    def of_all_together(self, singular: Singular, *, backward: bool) -> Origin:
        """Return the origin of a step whose weights are spread over processes, all of which call this at once.

        Args:
            singular: nodes of the loss whose backward may not be finite.
            backward: whether the losses are finite, and gradients are not.

        Raises:
            NothingFound: it is not known, or it was in another process.
        """
        if fit_whole(unwrapped(self._model)):
            with whole(unwrapped(self._model)):
                return self.of_gradients(singular) if backward else self._of_forward()
        (call,) = self._calls
        repeat = Repeat(self._model, call, together=True)
        result = repeat.run()  # only once: the other processes run it once
        mark = sole([one for one in result.marks if not one.mute])
        if mark is not None and (mark.subject in ("operation", "written", "input")):
            self.guilty = call
            faithful = is_faithful(call, result.outputs)
            origin = origin_of(mark, "replay", batch=repeat.batch, part="model")
            return called_at(origin, call.file, call.line).repeated(faithful=faithful)
        if not result.marks and (again := self._source(backward=backward)) is not None:
            return again
        raise NothingFound(self._reason("the model of this process was finite when all of them repeated its forward"))

    def _of_forward(self) -> Origin:
        """Return the origin of a loss that is not finite, after its backward, which has freed what its graph kept."""
        for call in self._calls:
            if not call.outputs or any(map(is_nonfinite, self._used(call))):
                found = self._repeat(call)
                if found is not None and found[1] is not False:
                    return found[0]
        again = self._source(backward=False)
        again = self._silent if again is not None and again.name == OUTPUT else again
        if again is not None:
            return again
        raise NothingFound(self._reason("the model of this process was finite when its forward was repeated"))

    def _used(self, call: Call) -> list[Tensor]:
        """Return the outputs of a forward that are in the graph of the loss."""
        roots = self._backward.roots if self._backward is not None else []
        nodes = set(nodes_below([one.grad_fn for one in roots]))
        return [one for one in call.outputs if one.grad_fn in nodes]

    # Inputs of an earlier step.

    def of_inputs(self, lag: int) -> Origin:
        """Return the origin that the inputs of a step give with the weights of ``lag`` steps later.

        Raises:
            NothingFound: it is not known.
        """
        for call in self._calls:
            names = {
                name: one for name, one in inputs_of(unwrapped(call.module), call.args, call.kwargs) if has_nan(one)
            }
            found = self._repeat(call)
            # weights of later steps may be damaged by this one, so that only an input that holds NaN is still known
            if found is not None and (found[0].subject not in ("weight", "buffer") or names):
                origin = (
                    found[0]
                    if found[0].subject not in ("weight", "buffer")
                    else self._of_input(*next(iter(names.items())))
                )
                return origin.later(lag)
            if names:
                return self._of_input(*next(iter(names.items()))).later(lag)
        raise NothingFound(self._reason("the model is finite on the inputs of that step"))

    def _of_input(self, name: str, tensor: Tensor) -> Origin:
        """Return the record of an input that held NaN."""
        rows = rows_of(tensor) if tensor.dim() and len(tensor) == self._batch else ()
        mark = Mark(0, "input", "", name=name, inputs=(operand_of(name, tensor),), rows=rows, rows_known=True)
        return origin_of(mark, "replay", batch=self._batch, part="model")

    # Parts.

    def _repeat(self, call: Call, gradients: list[Tensor | None] | None = None) -> tuple[Origin, bool | None] | None:
        """Return what repeating a forward finds, and whether it was faithful; None if it finds nothing."""
        try:
            repeat = Repeat(self._model, call, gradients)
            result: Replay = repeat.run()
            mark = first_cause(repeat, result)
            if mark is None or mark.earlier:
                if is_faithful(call, result.outputs) is False:
                    self._reasons.append("the repeated forward gave another result")
                elif mark is None and all(one.mute for one in result.marks) and (silent := sole(result.marks)):
                    self._silent = origin_of(silent, "replay", batch=repeat.batch, part="model").repeated(faithful=True)
                elif any(not one.mute for one in result.marks):
                    self._reasons.append("several operations made it, and which of them counts is not known")
                return None
            know_rows(repeat, mark)
            faithful = is_faithful(call, result.outputs)
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

    def _reason(self, last: str) -> str:
        return "; ".join(dict.fromkeys([*self._reasons, last, *([] if self._calls else [_NOT_KEPT])]))


def _told(what: str, error: Exception) -> str:
    return str(error) if isinstance(error, CannotRepeatError) else f"{what} ({words_of(error)[:200]})"


def _are_in(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return any(one is other for one in tensors for other in others)
