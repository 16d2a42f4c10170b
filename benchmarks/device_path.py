"""Runs on the CPU whose gradients gradwatch treats as on a device: rows come a step late, and no value is read in the step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradwatch import device

if TYPE_CHECKING:
    from collections.abc import Iterator

ON_DEVICE = ", device path"  # ends the name of what is done there


def on_device(name: str) -> str:
    """Return the name of a method or a run on the device path."""
    return name + ON_DEVICE


@contextmanager
def device_path(*, on: bool) -> Iterator[None]:
    """Within it, gradients are treated as on a device, if ``on``."""
    before = device.reading_is_free
    if on:
        device.reading_is_free = lambda _: False  # type: ignore[assignment]
    try:
        yield
    finally:
        device.reading_is_free = before
