"""Hidden units that are all alike from the beginning, so that they get the same updates and stay alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gradwatch import device
from gradwatch.measure.layers import DROPOUTS
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.measure.layers import Layers


def same_units(layers: Layers) -> str:
    """Return a sentence on the first layer whose units are all alike, the weights before them and those behind; "" if none is.

    Only weights in the memory of the CPU are read.
    """
    model = layers.model
    if model is None or any(isinstance(one, DROPOUTS) for one in model.modules()):
        return ""  # dropout tells units apart
    held = dict(_held(layers))
    before: tuple[str, int, float] | None = None
    for name, weight in held.items():
        if weight.dim() < 2:
            continue
        value = _only_number(weight)
        if value and before is not None and weight.shape[1] == before[1]:
            return (
                f"each weight of {before[0]} is {number(before[2])}, and each of {name} is {number(value)}: the {before[1]} "
                "units between them are alike, and stay so, as if there were one. Initialise them with random numbers, by He "
                "or Xavier."
            )
        bias = held.get(f"{name.rpartition('.')[0]}.bias")
        units, inputs = weight.shape[:2]
        several = 1 < units != inputs  # square ones may lie beside each other, such as those of queries and keys
        alike = several and (bias is None or _only_number(bias) is not None)
        before = (name, units, value) if value and alike else None
    return ""


def _held(layers: Layers) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and values of the weights of linear and convolution layers and of all biases in the memory of the CPU."""
    for column, parameter in layers.measured():
        wanted = parameter.requires_grad and (layers.with_units[column] or not layers.matrices[column])
        plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point()
        if wanted and plain and parameter.numel() and device.reading_is_free(parameter.device):
            yield layers.names[column], parameter.detach()


def _only_number(weight: torch.Tensor) -> float | None:
    """Return the number that each element is; None if they differ."""
    first = float(weight.flatten()[0])
    few = weight.flatten()[:64]  # as a rule, these differ, and no more is read
    return first if bool((few == first).all()) and bool((weight == first).all()) else None
