"""One way to clip a file, in place and without a host read beyond the norms already measured.

A new clip is one new file and one line here.
"""

from __future__ import annotations

from gradwatch.clips.base import Clip
from gradwatch.clips.norm import ClipNorm
from gradwatch.clips.value import ClipValue
from gradwatch.errors import UsageError, did_you_mean

CLIPS: dict[str, type[Clip]] = {"norm": ClipNorm, "value": ClipValue}


def clip_by_name(name: str) -> Clip:
    """Return the clip of this name with its defaults; a `UsageError` names the nearest one otherwise."""
    if name not in CLIPS:
        raise UsageError(
            f"There is no clip {name!r}.{did_you_mean(name, CLIPS)} "
            "Or pass an instance, such as gradwatch.ClipNorm(max_norm=1.0)."
        )
    return CLIPS[name]()


__all__ = ["CLIPS", "Clip", "ClipNorm", "ClipValue", "clip_by_name"]
