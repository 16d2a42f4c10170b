"""The run's own past: what rules judge by. No torch is loaded here."""

from gradwatch.history.ring import History

__all__ = ["History"]
