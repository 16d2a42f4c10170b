"""gradwatch: training-stability diagnostics for PyTorch.

One call watches every optimizer step: gradient norm per layer, weight norms, NaN and Inf, and the loss. Signs of
instability become one incident with a verdict, a prime suspect and advice; auto-clip acts on it in time.

>>> import torch
>>> import gradwatch
>>> _ = torch.manual_seed(0)
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
>>> x, y = torch.randn(32, 8), torch.randn(32, 1)
>>> with gradwatch.attach(model, clip="norm", report=None) as monitor:
...     for _ in range(10):
...         optimizer.zero_grad()
...         torch.nn.functional.mse_loss(model(x), y).backward()
...         optimizer.step()
>>> monitor.verdict, monitor.incidents
('healthy', [])
>>> monitor.history.grad_norm(last=10).shape
(10, 4)
"""

from __future__ import annotations

from gradwatch.attach import attach
from gradwatch.autoclip.policy import AutoClip
from gradwatch.autoclip.suggest import Suggestion
from gradwatch.clips import (
    Clip,
    ClipAdaGC,
    ClipAGC,
    ClipLayerNorm,
    ClipNorm,
    ClipNormThenValue,
    ClipPercentile,
    ClipValue,
    ClipZScore,
    ScaleToNorm,
)
from gradwatch.errors import GradwatchError, NonFiniteError, TrainingUnstableError, UsageError
from gradwatch.forensics import find_nonfinite
from gradwatch.monitor import Monitor, monitor_of
from gradwatch.records import Alarm, ClipRecord, Incident, Operand, Origin, Row, Snapshot
from gradwatch.reports.base import Report
from gradwatch.rules import Rule, default_rules
from gradwatch.version import VERSION

__version__ = VERSION

__all__ = [
    "Alarm",
    "AutoClip",
    "Clip",
    "ClipAGC",
    "ClipAdaGC",
    "ClipLayerNorm",
    "ClipNorm",
    "ClipNormThenValue",
    "ClipPercentile",
    "ClipRecord",
    "ClipValue",
    "ClipZScore",
    "GradwatchError",
    "Incident",
    "Monitor",
    "NonFiniteError",
    "Operand",
    "Origin",
    "Report",
    "Row",
    "Rule",
    "ScaleToNorm",
    "Snapshot",
    "Suggestion",
    "TrainingUnstableError",
    "UsageError",
    "attach",
    "default_rules",
    "find_nonfinite",
    "monitor_of",
]
