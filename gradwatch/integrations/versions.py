"""Import of a framework that may be missing or too old, with a sentence that says what to do."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gradwatch.errors import IntegrationError


def framework(name: str, least: str, needs: str = "", package: str = "") -> None:
    """Import the module ``name`` and check that it is as the integration needs it.

    Args:
        name: name of the module.
        least: oldest version of its package that the integration works with, such as ``"2.6"``.
        needs: path below the module that the integration uses; empty: nothing is checked.
        package: name of the package to install; empty: the first part of ``name``.

    Raises:
        IntegrationError: the module cannot be imported, is older than ``least``, or does not have what ``needs`` names.
    """
    package = package or name.partition(".")[0]
    install = f"pip install '{package}>={least}'"
    found = _version_of(package)
    if found and _numbers(found) < _numbers(least):  # before it is imported, which may fail for being old
        raise IntegrationError(
            f"{package} {found} is installed; this integration of gradwatch needs {least} or newer: {install}"
        )
    try:
        part: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # the framework is there, but something that it needs is not
        raise IntegrationError(f"{package} is not installed, which this integration is for: {install}") from None
    for attribute in filter(None, needs.split(".")):
        part = getattr(part, attribute, None)
    if part is None:
        raise IntegrationError(
            f"{package} {found or 'of unknown version'} has no {name}.{needs}, which this integration of gradwatch uses. Watch "
            "the training with gradwatch.attach(model) instead, which needs nothing of the framework."
        )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
