"""The table of runs in which advice was followed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Result = dict[str, Any]


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """Return a row for each kind of incident, and one for all."""
    kinds = Counter(str(result["kind"]) for result in results if result["kind"] is not None)
    return [
        *([kind, *_counts([one for one in results if one["kind"] == kind])] for kind in sorted(kinds)),
        ["all", *_counts([one for one in results if one["kind"] is not None])],
    ]


def _counts(results: Sequence[Result]) -> list[str]:
    def share(what: str) -> str:
        followed = [one[what] for one in results if one[what] is not None]
        return f"{sum(followed)} of {len(followed)}"

    return [str(len(results)), share("first"), share("both")]
