"""The graph of a loss, before its backward: which node has made a non-finite number of finite ones.

A node of autograd keeps some of what its operation got and returned. Where that is enough to run the operation again, or where
the result itself is kept, it is known whether it is finite. A finding counts only if its non-finite elements reach the root:
if the gradient of the root with respect to them is not zero.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics import ops
from gradwatch.forensics.bounds import Bounds
from gradwatch.forensics.flow import Flow, is_packed
from gradwatch.forensics.marks import Mark
from gradwatch.forensics.operands import has_nan, is_nonfinite, operand_of, plain, rows_of
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from gradwatch.forensics.names import Names

_MOST = 4096  # nodes
_SIGN = 2**63
_RESULTS = ("result", "output", "result0", "result1", "result2")


def nodes_below(roots: Iterable[Any], ends: frozenset[Any] = frozenset(), most: int = _MOST) -> list[Any]:
    """Return the nodes that a backward from ``roots`` runs, without those in ``ends`` and behind them."""
    ahead = [node for node in roots if node is not None and node not in ends]
    seen = dict.fromkeys(ahead)
    while ahead and len(seen) < most:
        for following, _ in ahead.pop().next_functions:
            if following is not None and following not in seen and following not in ends:
                seen[following] = None
                ahead.append(following)
    return list(seen)


def saved_in(node: Any) -> dict[str, Any]:
    """Return what a node keeps of its operation, by the names of the operation's arguments, if reading it runs no hook."""
    found: dict[str, Any] = {}
    kind: Any = type(node)
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # what it keeps is the program's affair
        return found
    for name, raw in _kept_by(kind):
        try:
            if not raw or not is_packed(getattr(node, raw)):
                found[name] = _signed(getattr(node, f"_saved_{name}"))
        except RuntimeError:  # noqa: PERF203  freed by a backward
            continue
    return found


@cache
def _kept_by(kind: Any) -> list[tuple[str, str]]:
    """Return the names of what nodes of a kind keep, each with the name of its raw tensors, empty if it is none."""
    names = dir(kind)
    kept = [name.removeprefix("_saved_") for name in names if name.startswith("_saved_")]
    return [(name, raw if (raw := f"_raw_saved_{name}") in names else "") for name in kept]


def _signed(value: Any) -> Any:
    """Return a value that a node keeps; torch returns negative dimensions and indices without their sign."""
    return value - 2 * _SIGN if type(value) is int and value >= _SIGN else value


class LossGraph:
    """What can be known of the graph behind some roots.

    Args:
        roots: losses.
        outputs: outputs of the model, at which the search ends.
    """

    def __init__(self, roots: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._roots = [one for one in roots if one.grad_fn is not None]
        self._ends = {one.grad_fn: one for one in outputs if one.grad_fn is not None}
        self._nodes = nodes_below([one.grad_fn for one in self._roots], frozenset(self._ends))
        self._saved: dict[Any, dict[str, Any]] = {}
        self._bounds = Bounds(self._ends, self._kept, self._output)

    def reaches(self, outputs: Sequence[Tensor]) -> bool:
        """Return whether an element of the outputs that is not finite reaches a root, or may."""
        bad = [one for one in outputs if one.grad_fn is not None and is_nonfinite(one)]
        try:
            places = [(one.grad_fn, one.output_nr) for one in bad]
            flow = self._flow(places)
        except RuntimeError:  # something was changed in place since
            return True
        return any(
            not flow.knows(place) or self._counts(flow.at(place), one) for place, one in zip(places, bad, strict=True)
        )

    def origin(self, names: Names, batch: int) -> Mark | None:
        """Return the first operation of the loss that makes a non-finite number which reaches a root; None if unknown."""
        found: list[tuple[Any, Mark, Tensor | None]] = []
        sole = self._sole()
        for node in self._nodes:
            made = self._mark(node, names, batch, sole)
            if made is not None:
                found.append((node, *made))
        found.sort(key=lambda one: one[1].order)
        flow = self._flow([(node, 0) for node, _, _ in found])
        for node, mark, output in found:
            if self._counts(flow.at((node, 0)), output):
                return mark
        return None

    def _sole(self) -> Any:
        """Return the only node that may have made something non-finite, because all others are within their range; else None."""
        bounds = self._bounds
        may = [node for node in self._nodes if bounds.of(node) is None and not bounds.is_safe(node)]
        if len(may) != 1 or not bounds.has_finite_inputs(may[0]) or bounds.has_unknown_input(may[0]):
            return None
        return may[0]

    def _flow(self, places: list[tuple[Any, int]]) -> Flow:
        """Return the gradients of the roots at some places; the graph stays as it is."""
        return Flow(self._roots, places, self._ends)

    @staticmethod
    def _counts(gradient: Tensor | None, output: Tensor | None) -> bool:
        """Return whether a root depends on any element of ``output`` that is not finite."""
        if gradient is None:
            return False
        here, values = plain(gradient), plain(output) if output is not None else None
        if here is None or values is None or not _fits(values, here):
            return here is not None and bool((here != 0).any())
        return bool((here[~torch.isfinite(values.expand_as(here))] != 0).any())

    # One node.

    def _kept(self, node: Any) -> dict[str, Any]:
        if node not in self._saved:
            self._saved[node] = saved_in(node)
        return self._saved[node]

    def _mark(self, node: Any, names: Names, batch: int, sole: Any) -> tuple[Mark, Tensor | None] | None:
        """Return the mark of a node whose inputs are finite and whose output is not, and that output."""
        op, kept = ops.forward_of(node.name()), self._kept(node)
        tensors = {name: one for name, one in kept.items() if isinstance(one, torch.Tensor)}
        output = self._output(op, kept)
        certain = _why(op, kept)
        if not certain and (output is None or not is_nonfinite(output)) and node is not sole:
            return None
        inputs = {name: one for name, one in tensors.items() if name not in (*_RESULTS, "total_weight")}
        bad = {name: one for name, one in inputs.items() if is_nonfinite(one)}
        below = [following for following, _ in node.next_functions]
        # of infinities that may have been written on purpose, only NaN is made anew, and the logarithm of a sum of nothing
        mute = (output is not None and has_nan(output)) or op == "logsumexp"
        if bad and (None in below or not below):
            return self._from_outside(node, op, bad, names, batch, output)
        if bad and not (mute and not any(map(has_nan, bad.values()))):
            return None
        finite = all(self._bounds.of(one, mute=mute) is not None for one in below if one is not None)
        if not (certain or finite or (not bad and _is_whole(op, inputs))):
            return None
        rows = _rows_of(output, names, batch)
        mark = Mark(
            node._sequence_nr(),
            "operation",
            op,
            op,
            node=node.name(),
            inputs=tuple(operand_of(name.replace("self", "input"), one) for name, one in inputs.items())[:4],
            output=operand_of("output", output) if output is not None and _is_complete(op, kept) else None,
            scalars=ops.signs_of(map(plain, inputs.values()))
            | {name: one for name, one in kept.items() if isinstance(one, (int, float))}
            | ({"got": certain} if certain else {}),
            rows=rows,
            rows_known=bool(rows),
        )
        return mark, output

    def _from_outside(
        self, node: Any, op: str, bad: dict[str, Tensor], names: Names, batch: int, output: Tensor | None
    ) -> tuple[Mark, Tensor | None] | None:
        """Return the mark of a node that got a non-finite tensor which was made without autograd, such as a target."""
        name, tensor = next(iter(bad.items()))
        known = names.of(tensor.detach())
        if tensor.grad_fn is not None or (known is not None and known.subject != "input"):
            return None
        rows = _rows_of(tensor, names, batch)
        mark = Mark(
            node._sequence_nr(),
            "input" if known is not None else "argument",
            op,
            op,
            node=node.name(),
            name=known.name if known is not None else name,
            inputs=(operand_of(known.name if known is not None else name, tensor),),
            rows=rows,
            rows_known=bool(rows),
        )
        return mark, output

    def _output(self, op: str, kept: dict[str, Any]) -> Tensor | None:
        """Return what an operation returned, kept or computed again from what is kept; None if that is not known."""
        results = [kept[name] for name in _RESULTS if isinstance(kept.get(name), torch.Tensor)]
        if isinstance(
            kept.get("result0"), torch.Tensor
        ):  # the others are for the backward alone, as that of ctc_loss with its -inf
            results = [kept["result0"]]
        if results:
            found: Tensor = next((one for one in results if is_nonfinite(one)), results[0])
            return found
        if not _is_complete(op, kept):  # what is known is where it cannot be finite
            divisor = kept["other"].detach()
            return torch.where((divisor == 0) | divisor.isnan(), torch.inf, 0.0)
        return _again(op, kept)


def _fits(values: Tensor, whole: Tensor) -> bool:
    """Return whether values have the shape of a whole, or one that is broadcast to it, as that of a divisor."""
    ends = zip(reversed(values.shape), reversed(whole.shape), strict=False)
    return values.dim() <= whole.dim() and all(one in (1, other) for one, other in ends)


def _rows_of(tensor: Tensor | None, names: Names, batch: int) -> tuple[int, ...]:
    """Return the rows of the batch at which a tensor is not finite; empty if all are, or if that is not known."""
    if tensor is None or not tensor.dim() or len(tensor) != batch or not names.has_no_dimension_of(batch):
        return ()
    rows = rows_of(tensor)
    return rows if len(rows) < batch else ()


def _why(op: str, kept: dict[str, Any]) -> str:
    """Return why an operation cannot have returned anything finite, whatever its other inputs are; empty if it can."""
    if op == "mean" and kept.get("self_sym_numel") == 0:
        return "got no element"
    weight, other = kept.get("total_weight"), kept.get("other")
    if (
        op in ("nll_loss", "nll_loss2d")
        and isinstance(weight, torch.Tensor)
        and kept.get("reduction") == 1
        and not weight.any()
    ):
        target: Any = kept.get("target")
        some = isinstance(target, torch.Tensor) and bool((target != kept.get("ignore_index", -1)).any())
        return "got labels whose weights add up to 0" if some else "got only labels that are ignored"
    if op == "div" and isinstance(other, torch.Tensor) and (zeros := int((other == 0).sum().item())):
        return f"got {counted(zeros, 'zero')} of {other.numel()} to divide by"
    return ""


def _is_whole(op: str, inputs: dict[str, Tensor]) -> bool:
    """Return whether all tensors that an operation got are kept, so that nothing else can be at fault."""
    packet = getattr(torch.ops.aten, op, None)
    if packet is None or not inputs:
        return False
    for name in packet.overloads():
        wanted = [one.name for one in getattr(packet, name)._schema.arguments if str(one.type) == "Tensor"]
        if wanted and set(wanted) == set(inputs):
            return True
    return False


def _is_complete(op: str, kept: dict[str, Any]) -> bool:
    """Return whether a node keeps more of its operation than a divisor."""
    return op != "div" or kept.get("self") is not None or not isinstance(kept.get("other"), torch.Tensor)


def _again(op: str, kept: dict[str, Any]) -> Tensor | None:
    """Return the result of an operation, run again on what its node keeps; None if something is missing."""
    packet = getattr(torch.ops.aten, op, None)
    for func in _overloads(packet) if packet is not None else ():
        wanted = func._schema.arguments
        if func._schema.is_mutable or not ops.can_repeat(func):
            continue
        given = {one.name: kept[one.name] for one in wanted if one.name in kept}
        if not all(one.name in given or one.has_default_value() for one in wanted):
            continue
        if not any(isinstance(one, torch.Tensor) for one in given.values()):
            continue
        try:
            with torch.no_grad():
                result = func(**given)
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        return result if isinstance(result, torch.Tensor) else None
    return None


def _overloads(packet: Any) -> Iterator[Any]:
    for name in packet.overloads():
        if "out" not in name:
            yield getattr(packet, name)
