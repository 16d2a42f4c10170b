"""The run's own past: what rules judge by. No torch is loaded here."""

from gradwatch.history.history import History

__all__ = ["History"]
