"""Kinds of values on the command line, for `argparse`: what is none of them is told as bad usage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def a_path(text: str) -> Path:
    """Return a path; an empty text, as a variable of the shell without a value leaves, is none."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path")
    return Path(text)


def a_number(least: int, most: int) -> Callable[[str], int]:
    """Return what reads a whole number between two others."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return value

    return read
