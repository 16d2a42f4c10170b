"""What happened at an operation and what to do about it, by the operation and by the numbers that it got."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.text.wording import counted, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.forensics.marks import Mark
    from gradwatch.records import Operand

_LOGS = frozenset({"log", "log2", "log10", "log1p", "xlogy", "special_xlog1py", "logit"})
_AT_MINUS_ONE = frozenset({"log1p", "special_xlog1py"})  # whose zero is at -1
_PRODUCTS = frozenset(
    {
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "matmul",
        "mul",
        "dot",
        "mv",
        "linear",
        "convolution",
        "scaled_dot_product_attention",
        "addmv",
        "mkldnn_rnn_layer",
        "square",
        "sum",
        "cumsum",
        "add",
        "einsum",
        "addcmul",
        "cosh",
        "sinh",
        "to_copy",
    }
)
_POWERS = frozenset({"mean", "std", "var", "pow"})  # which overflow, or fail in other ways
# by what is wrong with the inputs; the first that holds is said
_GROUPS: dict[str, frozenset[str]] = {
    "divides": frozenset({"div", "reciprocal", "rsqrt"}),
    "averages": frozenset({"mean", "nanmean", "nll_loss", "nll_loss2d"}),
    "weighs": frozenset({"nll_loss", "nll_loss2d"}),
    "spreads": frozenset({"std", "var"}),
    "of zero": (_LOGS - _AT_MINUS_ONE) | {"pow", "lgamma"},
    "of negative": _LOGS | {"sqrt", "rsqrt", "pow", "lgamma"},
    "in a range": frozenset({"acos", "asin", "atanh", "erfinv", "binary_cross_entropy"}),
    "over a row": frozenset({"softmax", "log_softmax", "logsumexp"}),
    "grows": frozenset({"exp", "expm1"}),
    "multiplies": _PRODUCTS | _POWERS,
}
# backwards whose inner operation has the gradient that arrived as its first input
_GRADIENT_FIRST = frozenset((op, "div") for op in ("sqrt", "log", "log2", "log10", "log1p"))
_HALF = ("float16", "bfloat16")
# operations of a tensor and a number of Python, in words
_WITH_NUMBERS = {"mul": "multiply by", "div": "divide by", "add": "add", "sub": "subtract"}
_NO_WEIGHT = "got labels whose weights add up to 0"
_ABOVE = "got +inf"
_NOT_LARGE = 1e6  # size of numbers whose sums of products float32 holds

_FORWARD = {
    "log": "clamp the argument: torch.log(p.clamp_min(1e-8)); of a softmax, use log_softmax.",
    "log1p": "the argument must stay above -1: torch.log1p(x.clamp_min(-1 + 1e-6)).",
    "sqrt": "the argument must not be negative: torch.sqrt(x.clamp_min(0) + 1e-12).",
    "rsqrt": "keep the argument above zero: torch.rsqrt(x.clamp_min(1e-6)).",
    "div": "keep the divisor from zero: x / y.clamp_min(1e-8); a mean over a mask needs at least one element.",
    "reciprocal": "keep the divisor from zero: 1 / x.clamp_min(1e-8).",
    "pow": "keep the base above zero if the exponent is negative or a fraction: x.clamp_min(1e-4) ** e.",
    "exp": "limit the argument, such as torch.exp(x.clamp_max({most})), or stay in logarithms: logsumexp, softplus.",
    "expm1": "limit the argument, such as torch.expm1(x.clamp_max({most})).",
    "cosh": "limit the argument, such as torch.cosh(x.clamp(-{most}, {most})).",
    "sinh": "limit the argument, such as torch.sinh(x.clamp(-{most}, {most})).",
    "acos": "clamp the argument: torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "asin": "clamp the argument: torch.asin(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "acosh": "the argument must be above 1: torch.acosh(x.clamp_min(1 + 1e-6)).",
    "atanh": "clamp the argument: torch.atanh(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "logit": "give it eps: torch.logit(p, eps=1e-6), or train on logits with binary_cross_entropy_with_logits.",
    "erfinv": "clamp the argument: torch.erfinv(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "softmax": "a row is masked altogether: keep one position in it, or mask with torch.finfo(x.dtype).min.",
    "log_softmax": "a row is masked altogether: keep one position in it, or mask with torch.finfo(x.dtype).min.",
    "scaled_dot_product_attention": "a row may be masked altogether: keep one position in it.",
    "logsumexp": "a row is masked altogether: keep one position in it.",
    "mean": "skip the batch if nothing is selected, or divide the sum by count.clamp_min(1).",
    "nll_loss": "all labels of this batch are ignored: skip it, or divide the sum of the losses by count.clamp_min(1).",
    "nll_loss2d": "all labels of this batch are ignored: skip it, or divide the sum of the losses by count.clamp_min(1).",
    "std": "it needs at least two elements: use correction=0, or skip groups of one.",
    "var": "it needs at least two elements: use correction=0, or skip groups of one.",
    "ctc_loss": "a target is longer than its input allows: zero_infinity=True, or leave such examples out.",
    "binary_cross_entropy": "give it probabilities in [0, 1], or use binary_cross_entropy_with_logits on logits.",
    "kl_div": "its targets must not be negative, and its inputs must be log-probabilities of positive numbers.",
    "layer_norm": "its inputs are too large for their dtype, or all alike with eps=0: run it in float32 with eps=1e-5.",
    "batch_norm": "its inputs are too large for their dtype, or all alike with eps=0: run it in float32 with eps=1e-5.",
    "to_copy": "the numbers do not fit into the narrower dtype: scale them, or stay in float32.",
    "weight_norm": "weights of zero have no direction: give them small random numbers.",
    "clone": "the numbers do not fit into the narrower dtype.",
    "copy": "the numbers do not fit into the narrower dtype.",
}
_BACKWARD = {
    "sqrt": "its derivative at 0 is infinite: torch.sqrt(x + 1e-12), or choose the elements before the sqrt.",
    "rsqrt": "keep the argument above zero: torch.rsqrt(x.clamp_min(1e-6)).",
    "hypot": "its derivative at (0, 0) is 0 / 0: torch.sqrt(x * x + y * y + 1e-12).",
    "atan2": "its derivative at (0, 0) is 0 / 0: move the points away from the origin.",
    "pow": "its derivative at 0 is infinite for exponents below 1: x.clamp_min(1e-8) ** e.",
    "acos": "its derivative at -1 and 1 is infinite: torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "asin": "its derivative at -1 and 1 is infinite: torch.asin(x.clamp(-1 + 1e-6, 1 - 1e-6)).",
    "log": "its derivative at 0 is infinite: clamp the argument before the log, also where the result is dropped.",
    "div": "keep the divisor from zero, also where the result is dropped: x / y.clamp_min(1e-8).",
    "cdist": "its derivative is not finite for equal points: add a small number to the squared distance.",
    "eigh": "its derivative is not finite for equal eigenvalues: add a small multiple of a diagonal of distinct numbers.",
    "linalg_vector_norm": "normalisation at zero: add eps inside the root.",
    "to_copy": "the gradients do not fit into the narrower dtype: scale the loss down, or use bfloat16 instead of float16.",
    "std": "its derivative is not finite where all elements are equal: torch.sqrt(x.var() + 1e-8).",
}
_BY_CAUSE = {
    _ABOVE: "a mask holds -inf where it masks, not inf: x.masked_fill(mask, -torch.inf).",
    _NO_WEIGHT: "skip the batch, or divide the sum of the losses by their weights.sum().clamp_min(1e-8).",
}
_WHERE = (
    "A branch that `torch.where` or a mask drops still has a backward, and 0 · inf is NaN: replace the bad arguments before "
    "the operation, torch.where(ok, f(torch.where(ok, x, 1)), 0)."
)


def cause_of(mark: Mark) -> str:
    """Return what happened, such as "got 3 zeros of 512 and returned 3 infinities"."""
    returned = _returned(mark.output)
    if "got" in mark.scalars:
        made = "NaN" if mark.output is None and mark.op in _GROUPS["averages"] else returned
        return f"{mark.scalars['got']} and returned {made}"
    if "singular" in mark.scalars:
        return f"is singular at {counted(mark.scalars['singular'], 'element')}: what its backward returns there is not finite"
    if mark.backward:
        inner = "" if mark.raw == mark.op else f" (in its `{mark.raw}`)"
        dropped = ", where the gradient that arrived was 0, as in a dropped branch" if _is_dropped(mark) else ""
        return f"returned {returned} in its backward{inner}{dropped}"
    got = _got(mark)
    return f"{got} and returned {returned}" if got else f"returned {returned}"


def _returned(output: Operand | None) -> str:
    if output is None:
        return "a non-finite value"
    parts = [counted(number, noun) for number, noun in ((output.nans, "NaN"), (output.infs, "infinity")) if number]
    return f"{' and '.join(parts) or 'a non-finite value'} of {output.elements}"


def _got(mark: Mark) -> str:
    """Return what was wrong with the inputs of a forward; empty if that is not known."""
    if "got" in mark.scalars:
        return str(mark.scalars["got"])
    if not mark.inputs:
        return ""
    first, last = mark.inputs[0], mark.inputs[-1]
    by_name = {one.name: one for one in mark.inputs}
    base = by_name.get("other" if mark.op in ("xlogy", "special_xlog1py") else "input", first)
    infinite, nan = _made(mark)
    if (given := _number_in(mark)) is not None:
        return _got_number(mark, given)
    by_op: dict[str, tuple[bool, str]] = {
        "divides": (bool(last.zeros), f"got {counted(last.zeros, 'zero')} of {last.elements} to divide by"),
        "averages": (not first.elements, "got no element"),
        "weighs": (nan and any(one.name == "weight" and one.zeros for one in mark.inputs), _NO_WEIGHT),
        "spreads": (nan and not _is_large(first), "got too few elements"),
        "of zero": (
            bool(base.zeros) and infinite and (mark.op != "pow" or _exponents(mark)[0] < 0),
            f"got {counted(base.zeros, 'zero')} of {base.elements}",
        ),
        "of negative": (
            base.smallest < 0 and (nan or mark.op in _AT_MINUS_ONE or mark.op == "lgamma"),
            f"got numbers down to {number(base.smallest)}",
        ),
        "in a range": (True, f"got numbers from {number(first.smallest)} to {number(first.largest)}"),
        "over a row": (bool(first.infs), _ABOVE if mark.scalars.get("above") else "got a row of -inf"),
        "grows": (True, f"got {first.dtype} numbers up to {number(first.largest)}"),
        "multiplies": (True, _largest(mark.inputs)),
    }
    target = next((one for one in mark.inputs if one.name == "target"), None)
    if target is not None and target.smallest == target.largest == mark.scalars.get("ignore_index"):
        return "got only labels that are ignored"
    for group, ops in _GROUPS.items():
        holds, words = by_op[group]
        if mark.op in ops and holds:
            return words
    return ""


def _number_in(mark: Mark) -> float | None:
    """Return the number of Python with which an operation has combined its tensor; None if none can be at fault."""
    given = mark.scalars.get("other") if mark.op in _WITH_NUMBERS and len(mark.inputs) == 1 else None
    if not isinstance(given, (int, float)):
        return None
    return given if not math.isfinite(given) or (given == 0 and mark.op == "div") else None


def _got_number(mark: Mark, given: float) -> str:
    """Return what was wrong with a number of Python."""
    zeros, elements = mark.inputs[0].zeros, mark.inputs[0].elements
    if mark.op == "mul" and math.isinf(given) and zeros:
        return f"got {counted(zeros, 'zero')} of {elements} to multiply by {number(given)}"
    return f"got {number(given)} to {_WITH_NUMBERS[mark.op]}"


def _made(mark: Mark) -> tuple[bool, bool]:
    """Return whether an operation may have made an infinity, and NaN."""
    return (True, True) if mark.output is None else (bool(mark.output.infs), bool(mark.output.nans))


def _exponents(mark: Mark) -> tuple[float, float]:
    """Return the range of the exponents of a power; of a base that is a number, NaN."""
    given = mark.scalars.get("exponent")
    if isinstance(given, (int, float)):
        return given, given
    found = next((one for one in mark.inputs if one.name == "exponent"), None)
    return (found.smallest, found.largest) if found is not None and len(mark.inputs) > 1 else (math.nan, math.nan)


def _is_large(one: Operand) -> bool:
    """Return whether squares of an operand's numbers may not fit into its dtype."""
    limit = {"float16": 200.0, "float64": 1e150}.get(one.dtype, 1e18)
    return max(abs(one.smallest), abs(one.largest)) > limit


def _largest(inputs: Sequence[Operand]) -> str:
    sizes = {max(abs(one.smallest), abs(one.largest)): one.dtype for one in inputs if not math.isnan(one.largest)}
    return f"got {sizes[max(sizes)]} numbers up to {number(max(sizes))}" if sizes else ""


def _got_no_large(mark: Mark) -> bool:
    """Return whether NaN was made, and no infinity, of finite numbers whose products cannot overflow."""
    made = mark.output is not None and bool(mark.output.nans) and not mark.output.infs
    finite = all(not one.nans and not one.infs for one in mark.inputs)
    return made and finite and all(max(abs(one.smallest), abs(one.largest)) < _NOT_LARGE for one in mark.inputs)


def _is_dropped(mark: Mark) -> bool:
    """Return whether a backward has made NaN of gradients of zero, as for the elements that `where` does not choose."""
    return (
        mark.output is not None
        and bool(mark.output.nans)
        and not mark.output.infs
        and bool(mark.inputs)
        and mark.inputs[0].zeros >= mark.output.nans
        and (mark.op, mark.raw) in _GRADIENT_FIRST
    )


def _overflows(mark: Mark) -> bool:
    """Return whether an operation that fails in other ways too has got numbers that are too large for it."""
    return not mark.backward and mark.op in _POWERS and bool(mark.inputs) and _got(mark) == _largest(mark.inputs)


def _known(mark: Mark) -> str | None:
    """Return what is advised for an operation that fails as this one has; None if there is nothing in particular."""
    if mark.backward:
        return _BACKWARD.get(mark.op)
    if (given := _number_in(mark)) is not None:
        if mark.op == "mul" and math.isinf(given) and mark.inputs[0].zeros:
            return "0 times infinity is NaN: write infinities where a mask is, x.masked_fill(mask, -torch.inf)."
        return (
            "keep the divisor from zero, as in x / max(n, 1)." if given == 0 else "look at where this number is made."
        )
    if _got(mark) in _BY_CAUSE:
        return _BY_CAUSE[_got(mark)]
    known = None if _overflows(mark) else _FORWARD.get(mark.op)
    most = (
        "10" if any(one.dtype == "float16" for one in mark.inputs) else "20"
    )  # exp(20) is beyond the range of float16
    return known.replace("{most}", most) if known is not None else None


def advice_of(mark: Mark) -> tuple[str, ...]:
    """Return what to do, the most likely to help first."""
    if mark.subject in ("weight", "buffer"):
        return (
            f"`{mark.name}` was damaged before this step: look at the update of the step before, and go back to a checkpoint "
            "with finite values.",
        )
    if mark.subject == "argument" and not mark.rows:
        beyond = " In float16, numbers beyond 65,504 are infinite: make it in float32 or bfloat16."
        narrow = bool(mark.inputs) and mark.inputs[0].dtype == "float16" and not mark.inputs[0].nans
        return (
            f"Look at where the `{mark.name}` of `{mark.op}` is made: it holds values that are not finite.{beyond * narrow}",
        )
    if mark.subject in ("input", "argument"):
        return ("Look at these rows where they are loaded: assert torch.isfinite(x).all() in the Dataset.",)
    if mark.subject == "written":
        return ("Look at this line: what it writes must not reach the loss.",)
    if "reduced" in mark.scalars:
        return (
            "Reduce gradients in a wider dtype, as by MixedPrecisionPolicy(reduce_dtype=torch.float32), or scale the loss.",
        )
    lines = []
    if mark.backward and _is_dropped(mark):
        lines.append(_WHERE)
    known = _known(mark)
    if mark.op in _LOGS and known is None:
        known = _FORWARD["log"]
    multiplies = mark.op in _PRODUCTS or _overflows(mark)
    if any(one.dtype == "float16" for one in mark.inputs) and multiplies and not mark.backward:
        known = (
            "the result does not fit into float16 (at most 65,504), and no loss scale helps: use bfloat16, or run this operation "
            "in float32 under torch.autocast(x.device.type, enabled=False), with x.float()."
        )
    if known is not None:
        narrow = any(one.dtype in _HALF for one in mark.inputs) and "1e-" in known and "float32" not in known
        lines.append(
            known[0].upper() + known[1:] + " Do it in float32: narrower numbers round such constants away." * narrow
        )
    elif not multiplies:
        lines.append(
            f"Keep what `{mark.op}` gets within the range in which it{' and its derivative are' * mark.backward or ' is'} finite."
        )
    elif not mark.backward and _got_no_large(mark):
        lines.append(
            "Look for a factor or a summand on this line that is NaN: the tensors that it got are finite and not large."
        )
    elif not mark.backward:
        lines.append("The inputs are too large: look at the steps before, normalise, or lower the learning rate.")
    return tuple(lines)
