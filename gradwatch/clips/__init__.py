"""The clips, one per file. They change gradients in place, and on a device without reading a value on the host.

To add a clip, add one file, one line here and one in the table of clips (`docs/auto-clip.md`).
"""

from __future__ import annotations

from gradwatch.clips.adagc import ClipAdaGC
from gradwatch.clips.agc import ClipAGC
from gradwatch.clips.base import Clip, Step, UnreadStep
from gradwatch.clips.layer_norm import ClipLayerNorm
from gradwatch.clips.norm import ClipNorm
from gradwatch.clips.norm_then_value import ClipNormThenValue
from gradwatch.clips.percentile import ClipPercentile
from gradwatch.clips.scale import ScaleToNorm
from gradwatch.clips.value import ClipValue
from gradwatch.clips.zscore import ClipZScore
from gradwatch.errors import UsageError, did_you_mean

CLIPS: dict[str, type[Clip]] = {
    "norm": ClipNorm,
    "value": ClipValue,
    "layer norm": ClipLayerNorm,
    "norm then value": ClipNormThenValue,
    "scale": ScaleToNorm,
    "agc": ClipAGC,
    "percentile": ClipPercentile,
    "zscore": ClipZScore,
    "adagc": ClipAdaGC,
}


def clip_by_name(name: str) -> Clip:
    """Return the clip of this name with default bounds.

    Raises:
        UsageError: there is no such clip; the message names the nearest one.
    """
    if name not in CLIPS:
        raise UsageError(
            f"There is no clip {name!r}.{did_you_mean(name, CLIPS)} "
            "Or pass an instance, such as gradwatch.ClipNorm(max_norm=1.0)."
        )
    return CLIPS[name]()


__all__ = [
    "CLIPS",
    "Clip",
    "ClipAGC",
    "ClipAdaGC",
    "ClipLayerNorm",
    "ClipNorm",
    "ClipNormThenValue",
    "ClipPercentile",
    "ClipValue",
    "ClipZScore",
    "ScaleToNorm",
    "Step",
    "UnreadStep",
    "clip_by_name",
]
