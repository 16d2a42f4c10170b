"""gradwatch's own time for a step, by part, from timers put around the calls that make them up."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from gradwatch.measure.norms import NormPlan
from gradwatch.measure.sampling import Sampling
from gradwatch.pipeline import Pipeline
from gradwatch.probe.gradients import Gradients
from gradwatch.reports.desk import ReportDesk

if TYPE_CHECKING:
    from types import TracebackType

    from gradwatch.probe.probe import Probe

_MEASURING = ((NormPlan, "norms"), (Gradients, "present"), (Sampling, "take"))
_RULES = ((Pipeline, "judge"), (Pipeline, "bounds"))
_REPORTS = ((ReportDesk, "show"),)


class Parts:
    """Where the time goes, in seconds.

    ``measuring`` is norms, weights and units; ``rules`` is history, rules, alarms and incidents; ``hooks`` is all that is
    neither of them nor ``reports``: finding the step, its loss and its row.
    The timers themselves cost about a third of a microsecond a call, which is within the figures.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.seconds = dict.fromkeys(("hooks", "measuring", "rules", "reports"), 0.0)
        self._originals: list[tuple[Any, str, Any]] = []
        self._inside = 0.0  # what calls within the one under way have taken

    def __enter__(self) -> Parts:
        self._began = self._probe.seconds
        for part, places in (("measuring", _MEASURING), ("rules", _RULES), ("reports", _REPORTS)):
            for owner, name in places:
                original = vars(owner)[name]
                self._originals.append((owner, name, original))
                setattr(owner, name, self._timed(part, original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        known = sum(self.seconds.values())
        self.seconds["hooks"] = self._probe.seconds - self._began - known

    def _timed(self, part: str, original: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outside, self._inside = self._inside, 0.0
            started = perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                took = perf_counter() - started
                self.seconds[part] += took - self._inside
                self._inside = outside + took

        return timed
