"""Copies of the output of a model, apart from its graph, which stand for its call when a loss is computed again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from gradwatch.forensics.pure import is_plain
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.forensics.values import Unknown


def detached(output: Any) -> Any:
    """Return a copy of the output of a model, apart from its graph, whose own saved tensors are still needed.

    Raises:
        CannotRepeatError: it is of another kind than a tensor, a list, a tuple, a dict, a named tuple or a dataclass.
    """
    if isinstance(output, torch.Tensor):
        return output.detach().clone().requires_grad_(output.requires_grad)
    if type(output) in (list, tuple):
        return type(output)(detached(one) for one in output)
    if type(output) is dict:
        return {key: detached(one) for key, one in output.items()}
    if is_plain(output):
        return output
    if hasattr(output, "_fields") and isinstance(output, tuple):
        return tuple.__new__(type(output), [_part(one) for one in output])
    if hasattr(output, "__dataclass_fields__") and hasattr(output, "__dict__"):
        return _dataclass(output)
    raise CannotRepeatError("the output of the model is no tensor, list, tuple, dict or dataclass")


def _dataclass(output: Any) -> Any:
    """Return a copy of a dataclass, such as of a `ModelOutput` of transformers, which is a dict too, without calling its code."""
    kind = type(output)
    parts = {id(one): _part(one) for one in vars(output).values()}
    if isinstance(output, OrderedDict):
        made = OrderedDict.__new__(kind)
        for key, one in OrderedDict.items(output):
            OrderedDict.__setitem__(made, key, parts[id(one)] if id(one) in parts else _part(one))
    else:
        made = object.__new__(kind)
    vars(made).update({name: parts[id(one)] for name, one in vars(output).items()})
    return made


def _part(value: Any) -> Any:
    try:
        return detached(value)
    except CannotRepeatError as error:  # such as a cache, which no loss is computed from
        return Unknown(str(error))
