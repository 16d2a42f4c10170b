"""The operation that made the first non-finite number, where one of two processes has made it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.torchrun import played as played_by

Both = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """All trainings, played once in two processes."""
    first, second = played_by(tmp_path_factory, 2, "tests.forensic_processes")
    return {name: (first[name], second[name]) for name in first}


CASES = [
    ("DDP", "in the model", ("log", "forward", "blocks.1"), "replay"),
    ("DDP", "in the model's backward", ("sqrt", "backward", "blocks.1"), "replay"),
    ("DDP", "in the loss", ("log", "forward", None), "source"),
    ("FSDP2", "in the model", ("log", "forward", "blocks.1"), "replay"),
    ("FSDP2", "in the model's backward", ("sqrt", "backward", "blocks.1"), "replay"),
    ("FSDP2", "in the loss", ("log", "forward", None), "source"),
    ("FSDP2", "in the loss's backward", ("sqrt", "backward", None), "source"),
    ("FSDP2, twice", "in the model's backward", ("sqrt", "backward", "blocks.1"), "replay"),
    ("FSDP2, large", "in the model", ("log", "forward", "blocks.1"), "replay"),
]


@pytest.mark.parametrize(("wrapper", "case", "expected", "way"), CASES)
def test_the_process_that_failed_names_the_operation_and_the_other_one_shows_it(
    wrapper: str, case: str, expected: tuple[Any, ...], way: str, played: dict[str, Both]
) -> None:
    """Rank 0, whose lines people read, says on which rank it was."""
    first, second = played[f"{wrapper}, {case}"]
    assert tuple(second["origin"][:3]) == tuple(first["origin"][:3]) == expected
    assert (first["origin"][3], second["origin"][3]) == (1, None)
    assert (first["way"], second["way"]) == (way, way)
    op, line = expected[0], first["origin"][4]
    assert f"on rank 1, `{op}` at causes.py:" in line
    assert f"on rank 1, `{op}`" in " ".join(first["told"].split())
    assert first["skipped"] == second["skipped"] == 2


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [
        *itertools.product(
            ("DDP", "FSDP2"), ("in the model", "in the model's backward", "in the loss", "in the loss's backward")
        ),
        ("FSDP2, twice", "in the model's backward"),
    ],
)
def test_the_training_goes_on_bit_for_bit(wrapper: str, case: str, played: dict[str, Both]) -> None:
    """As one whose failed steps are left out by hand."""
    for watched, plain in zip(played[f"{wrapper}, {case}"], played[f"{wrapper}, unwatched"], strict=True):
        assert watched["parameters"] == plain["parameters"]
        assert watched["generator"] == plain["generator"]


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_where_only_one_process_looks_none_waits_for_the_other(wrapper: str, played: dict[str, Both]) -> None:
    """Nothing is exchanged about it."""
    first, second = played[f"{wrapper}, one looks"]
    assert first["origin"] is None
    assert (second["origin"] is None) == (wrapper == "FSDP2")
    assert first["skipped"] == second["skipped"] == 2


def test_a_backward_under_fsdp2_of_a_model_that_is_too_large_is_not_repeated_and_says_so(
    played: dict[str, Both],
) -> None:
    """It would reduce gradients of the training."""
    first, second = played["FSDP2, large, in the model's backward"]
    for one in (first, second):
        assert one["origin"] is None or one["way"] == "watched step"
        assert any("is not known" in note for note in one["notes"])


def test_after_three_investigations_nothing_is_said_against_the_processes(played: dict[str, Both]) -> None:
    """All of them could repeat a fourth step, which is only not looked at."""
    for one in played["FSDP2, often"]:
        assert one["origin"][:3] == ["sqrt", "backward", "blocks.1"]
        assert one["skipped"] == 5
        assert one["notes"] == []


def test_find_nonfinite_names_no_operation_for_what_another_process_has_made(played: dict[str, Both]) -> None:
    """Gradients of all processes are summed, and only one of them has seen the operation."""
    first, second = played["FSDP2, found"]
    assert (first["op"], second["op"]) == (None, "sqrt")
    assert first["told"] == (
        "a gradient is not finite; no operation that was watched here has made it. "
        "Another process has, if processes exchange gradients."
    )
