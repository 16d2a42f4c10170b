"""The past of a run: the rows and reference values that rules compare with. Does not import torch."""

from gradwatch.history.history import History

__all__ = ["History"]
