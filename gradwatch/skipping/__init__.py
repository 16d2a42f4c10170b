"""Leaving out optimizer steps, so that parameters, optimizer state and buffers stay bit-identical."""

from gradwatch.skipping.buffers import Buffers
from gradwatch.skipping.skip import Skip

__all__ = ["Buffers", "Skip"]
