"""The hooks on a model and its optimizers, which make one row just before each update."""

from gradwatch.probe.budget import Budget
from gradwatch.probe.probe import Probe

__all__ = ["Budget", "Probe"]
