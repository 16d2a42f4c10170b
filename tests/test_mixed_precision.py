"""Non-finite steps under FSDP2's policies of mixed precision: what two processes say of them, and how they are repeated."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from gradwatch.forensics import casts
from tests.mixed_precision import REPEATED, WRAPPERS
from tests.torchrun import played as played_by

Both = tuple[dict[str, Any], dict[str, Any]]
CASES = {
    "in the model": ("log", "forward", "blocks.1"),
    "in the model's backward": ("sqrt", "backward", "blocks.1"),
    "in the loss's backward": ("sqrt", "backward", None),
    "in a product": ("mm", "forward", "blocks.1"),
}
HALF_ONLY = ("bfloat16", "in a product")  # is finite


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Everything, played once in two processes."""
    first, second = played_by(tmp_path_factory, 2, "tests.mixed_precision")
    return {name: (first[name], second[name]) for name in first}


@pytest.mark.parametrize(("wrapper", "case"), [one for one in itertools.product(WRAPPERS, CASES) if one != HALF_ONLY])
def test_the_operation_is_named_under_a_policy_in_the_forward_and_in_the_backward(
    wrapper: str, case: str, played: dict[str, Both]
) -> None:
    """By the process that failed; the other one shows it. The repeated forward is that of the training."""
    first, second = played[f"{wrapper}, {case}"]
    assert tuple(second["origin"][:3]) == tuple(first["origin"][:3]) == CASES[case]
    assert (first["origin"][3], second["origin"][3]) == (1, None)
    in_model = CASES[case][2] is not None
    assert (second["way"], second["faithful"]) == (("replay", True) if in_model else ("source", None))
    assert first["skipped"] == second["skipped"] == 2


def test_what_overflows_in_float16_alone_is_finite_in_bfloat16(played: dict[str, Both]) -> None:
    """So that the policy is what makes it fail."""
    for one in played[", ".join(HALF_ONLY)]:
        assert (one["origin"], one["skipped"], one["notes"]) == (None, 0, [])


@pytest.mark.parametrize(("wrapper", "case"), [one for one in itertools.product(WRAPPERS, CASES) if one != HALF_ONLY])
def test_the_training_goes_on_bit_for_bit(wrapper: str, case: str, played: dict[str, Both]) -> None:
    """As one whose failed steps are left out by hand."""
    for watched, plain in zip(played[f"{wrapper}, {case}"], played[f"{wrapper}, unwatched"], strict=True):
        assert watched["parameters"] == plain["parameters"]
        assert watched["generator"] == plain["generator"]


@pytest.mark.parametrize(
    ("how", "name"),
    [*itertools.product(("repeated", "repeated, checkpointed"), REPEATED), ("repeated, together", "bfloat16")],
)
def test_a_step_is_repeated_bit_for_bit(how: str, name: str, played: dict[str, Both]) -> None:
    """Outputs and gradients, with inputs in dicts and lists; afterwards all hooks are there again."""
    for one in played[f"{how}: {name}"]:
        assert one["outputs"] == [True] * 3
        assert one["gradients"] == [True] * 8
        assert one["dtypes"] == REPEATED[name][1]
        assert one["overflowed"] == 0
        assert one["hooks"]


@pytest.mark.parametrize(
    ("case", "module", "direction", "says"),
    [
        ("an input", "", "forward", ("got float32 numbers up to 100,000 ", "row 3 of the batch")),
        ("an input of a module", "blocks.1", "forward", (" in blocks.1 (forward) got float32 numbers", "input (16, 6) float32")),
        ("a weight", "blocks.1.linear", "forward", ("returned 1 infinity of 36", "blocks.1.linear.weight (6, 6) float32")),
        ("a weight on the host", "blocks.1.linear", "forward", ("of 36", "blocks.1.linear.weight (6, 6) float32")),
        ("a weight replicated", "blocks.1.linear", "forward", ("of 36", "blocks.1.linear.weight (6, 6) float32")),
        ("a reduction", "", "backward", ("which FSDP2 reduces in float16, and returned", "gradient of head.bias (1,) float32")),
        ("a gradient", "", "backward", ("returned 16 infinities of 16 in its backward", "input (16, 1) float32")),
    ],
)  # fmt: skip
def test_a_cast_of_fsdp2_that_overflows_is_named(
    case: str, module: str, direction: str, says: tuple[str, str], played: dict[str, Both]
) -> None:
    """What is cast was finite: neither the input nor the weight is blamed."""
    first, second = played[f"step: {case}"]
    for one in (first, second):
        assert (one["op"], one["subject"], one["module"], one["direction"]) == (
            "to_copy",
            "operation",
            module,
            direction,
        )
        assert (one["found_by"], one["faithful"]) == ("replay", True)
    assert says[0] in second["line"]
    assert says[1] in second["details"][0]
    assert second["advice"]


def test_of_a_larger_model_all_processes_repeat_one_forward_together(played: dict[str, Both]) -> None:
    """By FSDP2's own hooks, which cast too; its output is that of the training to the bit."""
    for one in played["bfloat16, large, in the model"]:
        assert tuple(one["origin"][:3]) == ("log", "forward", "blocks.1")
        assert (one["way"], one["faithful"]) == ("replay", True)


def test_a_weight_that_was_not_finite_before_it_was_cast_is_blamed(played: dict[str, Both]) -> None:
    """As without a policy."""
    for one in played["step: a weight that is NaN"]:
        assert (one["subject"], one["faithful"]) == ("weight", True)
        assert "blocks.1.linear.weight was not finite before the forward" in one["line"]


def test_a_repetition_that_is_not_that_of_the_training_names_nothing_and_says_so(played: dict[str, Both]) -> None:
    """A forward that depends on how often it was called."""
    for one in played["step: another result"]:
        assert "op" not in one
        assert any("is not known: the repeated forward gave another result;" in note for note in one["notes"])


def test_a_model_may_be_attached_before_it_is_sharded(played: dict[str, Both]) -> None:
    """Its outputs are compared as they were before FSDP2 has cast them, which is how gradwatch has seen them."""
    for one in played["step: attached before"]:
        assert (one["op"], one["direction"], one["faithful"]) == ("sqrt", "backward", True)


def test_where_torch_has_no_functions_that_only_cast_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in older versions; without a policy there is nothing to cast."""
    state = SimpleNamespace(_mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    monkeypatch.setattr(casts, "sharded_modules", lambda _: [SimpleNamespace(_get_fsdp_state=lambda: state)])
    assert not casts.can_cast_again(nn.Linear(1, 1))
    state._cast_forward_inputs = lambda args, kwargs: (args, kwargs)
    assert casts.can_cast_again(nn.Linear(1, 1))
    state = SimpleNamespace(_mp_policy=MixedPrecisionPolicy())
    assert casts.can_cast_again(nn.Linear(1, 1))
