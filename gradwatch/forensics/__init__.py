"""The operation that made the first non-finite number of a step, found after the fact."""

from gradwatch.forensics.find import Watch, find_nonfinite

__all__ = ["Watch", "find_nonfinite"]
