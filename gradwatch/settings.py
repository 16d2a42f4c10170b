"""Validated, frozen settings: the base of rules, clips and policies.

pydantic checks at the edge; what it refuses comes out as a `UsageError` that names the value and the way out.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradwatch.errors import UsageError, did_you_mean


class Settings(BaseModel):
    """Frozen fields with limits; unknown names, NaN and Inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_in_plain_words(type(self), error)) from None

    def __str__(self) -> str:
        return repr(self)


def _in_plain_words(settings: type[Settings], error: ValidationError) -> str:
    sentences = []
    for detail in error.errors():
        field = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            hint = did_you_mean(field, settings.model_fields)
            sentences.append(f"{settings.__name__} has no setting {field!r}.{hint}")
        else:
            sentences.append(f"{settings.__name__}({field}={detail['input']!r}): {detail['msg']}.")
    return " ".join(sentences)
