"""An end in parts, of which each is done whatever becomes of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Failure(NamedTuple):
    """What a part raised."""

    part: str
    error: BaseException


def all_done(parts: Iterable[tuple[str, Callable[[], object]]]) -> list[Failure]:
    """Do every part, and return what was raised; a part that returns failures adds them.

    An interrupt by the user waits as the errors do: whoever calls raises it when all is done.
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
