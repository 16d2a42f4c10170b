"""Types of command-line values for `argparse`, which reports invalid values as bad usage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def a_path(text: str) -> Path:
    """Return ``text`` as a path.

    Raises:
        argparse.ArgumentTypeError: the text is empty, for example because a shell variable is not set.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def a_number(least: int, most: int) -> Callable[[str], int]:
    """Return a function that parses an integer from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return value

    return read
