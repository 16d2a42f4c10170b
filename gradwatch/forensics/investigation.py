"""One investigation: of a loss, of gradients, or of the inputs of an earlier step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.forensics.attempts import Attempts
from gradwatch.forensics.explain import called_at, origin_of, sole
from gradwatch.forensics.graph_walk import LossGraph, nodes_below
from gradwatch.forensics.marks import Mark
from gradwatch.forensics.names import OUTPUT, inputs_of
from gradwatch.forensics.operands import has_nan, is_nonfinite, operand_of, rows_of
from gradwatch.forensics.replay import Repeat, is_faithful
from gradwatch.forensics.spread import fit_whole, whole
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.singular import Singular
    from gradwatch.records import Origin


class NothingFound(Exception):  # noqa: N818  an outcome, not an error
    """Raised with the reason why the operation is not known."""


class Investigation(Attempts):
    """Looks for the origin of one step. The arguments are those of `Attempts`."""

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
        last = repeated if self._calls else "the graph of the loss is gone"
        raise NothingFound(self._reason(last, of_result=bool(self._calls)))

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
            with whole(unwrapped(self._model)) as self._overflowed:
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
        finite = "the model of this process was finite when its forward was repeated"
        raise NothingFound(self._reason(finite, of_result=True))

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
            given = inputs_of(unwrapped(call.module), call.args, call.kwargs)
            names = {name: one for name, one in given if one.grad_fn is None and has_nan(one)}
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


def _are_in(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return any(one is other for one in tensors for other in others)
