"""A shutdown in parts, each of which is executed even if others fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Failure(NamedTuple):
    """The error that a part raised."""

    part: str
    error: BaseException


def all_done(parts: Iterable[tuple[str, Callable[[], object]]]) -> list[Failure]:
    """Call every part and return the failures, including those that a part returns as a list.

    Nothing is raised, not even an interrupt by the user: the caller raises it when everything is done.
    """
    failures = []
    for part, do in parts:
        try:
            found = do()
        except BaseException as error:  # noqa: PERF203  that is what this is for
            failures.append(Failure(part, error))
        else:
            failures += [one for one in found if isinstance(one, Failure)] if isinstance(found, list) else []
    return failures
