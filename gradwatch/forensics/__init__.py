"""The operation that made the first non-finite number of a step, found after the fact."""

from gradwatch.forensics.find import Watch, find_nonfinite
from gradwatch.forensics.inspector import Inspector
from gradwatch.forensics.settings import Mode

__all__ = ["Inspector", "Mode", "Watch", "find_nonfinite"]
