"""The hooks on a model and its optimizers, which make one row just before each update."""

from gradwatch.probe.budget import Budget
from gradwatch.probe.investigator import Together
from gradwatch.probe.optimizer_hooks import listen, unlisten
from gradwatch.probe.patches import BACKWARD
from gradwatch.probe.probe import Probe

__all__ = ["BACKWARD", "Budget", "Probe", "Together", "listen", "unlisten"]
