"""When to clip, how tight, when to let go, and what it did."""

from gradwatch.autoclip.policy import AutoClip

__all__ = ["AutoClip"]
