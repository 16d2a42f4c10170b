"""Validated, frozen settings: the base class of rules, clips and policies.

pydantic checks the values; its errors are raised as a `UsageError` that names the setting, the value and what is expected.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradwatch.errors import UsageError, did_you_mean


class Settings(BaseModel):
    """Frozen settings with limits. Unknown names, invalid values, NaN and Inf raise `UsageError`."""

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
            told = detail["msg"].removeprefix("Value error, ")  # the prefix is pydantic's
            end = "" if told.endswith((".", "?")) else "."
            sentences.append(f"{settings.__name__}({field}={detail['input']!r}): {told}{end}")
    return " ".join(sentences)
