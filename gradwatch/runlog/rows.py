"""Conversion of a row in the tables of a run log to a `Row`, as it was measured."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from gradwatch.records import Culprits, Provenance, Row
from gradwatch.runlog.plain import checked, from_json
from gradwatch.runlog.schema import unpacked, unpacked_or_one

if TYPE_CHECKING:
    from numpy.typing import NDArray

Count = Annotated[int, Field(ge=0, lt=2**53)]


def row_of(numbers: tuple[Any, ...], arrived: bytes | None, layers: int, family: Any) -> Row:
    """Return the row of ``layers`` layers that is stored in these columns (see `RunLog.rows`).

    ``arrived`` is the newest entry of ``arrivals``; None: it is not known.

    Raises:
        ValueError, TypeError: the columns do not hold a valid row.
    """
    step, loss, norm, coefficient, gradient, weight, rate, dead, unchanged, applied = numbers[:10]
    bad, bad_weight, counts, culprits, *provenance = numbers[10:]
    if applied is None:
        applied = 1.0 if coefficient is None else coefficient
    mask = None if bad is None else _mask(bad, layers)
    mask_of_weights = None
    if weight is not None:
        mask_of_weights = _mask(b"" if bad_weight is None else bad_weight, layers) > 0
    return Row(
        step=int(step),
        loss=np.nan if loss is None else float(loss),
        grad_norm=unpacked(gradient, layers),
        global_norm=np.nan if norm is None else float(norm),
        weight_norm=None if weight is None else unpacked(weight, layers),
        nonfinite=mask,
        nonfinite_weight=mask_of_weights,
        counts=None if counts is None else _counts(counts, layers),
        poisoned=mask is not None,
        rate=unpacked_or_one(rate, layers),
        family=family,
        applied=float(applied),
        dead_share=unpacked_or_one(dead, layers),
        unchanged=unpacked_or_one(unchanged, layers),
        arrived=None if arrived is None else _mask(arrived, layers) > 0,
        culprits=None if culprits is None else from_json(Culprits, culprits),
        provenance=Provenance() if provenance[0] is None else _provenance(*provenance),
    )


def _mask(blob: bytes, layers: int) -> NDArray[np.uint8]:
    mask = np.zeros(layers, dtype=np.uint8)
    mask[: len(blob)] = np.frombuffer(blob, dtype=np.uint8)
    return mask


def _counts(text: str, layers: int) -> dict[int, tuple[int, int]]:
    counts = from_json(dict[Count, tuple[Count, Count]], text)
    if any(place >= layers for place in counts):
        raise ValueError("it counts elements of layers that are not in its table of layers")
    return counts


@functools.cache
def _provenance(*values: Any) -> Provenance:
    return checked(Provenance, dict(zip(Provenance._fields, values, strict=True)))
