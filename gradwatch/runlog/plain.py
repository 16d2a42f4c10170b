"""Conversion of records to JSON and back. What is read is validated, so a damaged or forged file only raises an error."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

Record = TypeVar("Record")
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def to_json(value: Any) -> str:
    """Return plain values, dataclasses and named tuples as JSON.

    Values that JSON does not support are written as text: NaN and infinity as nan and inf, other objects as ``str()`` of them.
    """
    return json.dumps(_plain(value), allow_nan=False, default=lambda other: storable(str(other)))


def storable(text: str) -> str:
    r"""Return a text that can be encoded as UTF-8: other characters, as of an undecodable file name, are escaped (``\udcff``)."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def from_json(kind: type[Record], text: str | bytes) -> Record:
    """Return the ``kind`` that `to_json` wrote as ``text``; raises a `ValueError` if the text is not valid."""
    adapter: TypeAdapter[Record] = _adapter(kind)
    return adapter.validate_json(text)


def checked(kind: type[Record], value: Any) -> Record:
    """Return plain values as a ``kind``; raises a `ValueError` if they are not valid."""
    adapter: TypeAdapter[Record] = _adapter(kind)
    return adapter.validate_python(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {storable(str(key)): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
