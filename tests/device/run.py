"""Runs checks on the stand-in, in a process of their own: `python -m tests.device.run LIBRARY GROUP`, a line of JSON for each."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.device.standin import StandIn


def main(library: str, group: str) -> None:
    """Run the checks of one group in the order in which they stand."""
    device = StandIn(Path(library))
    import gradwatch
    from tests.device.checks import CHECKS

    warnings.simplefilter("ignore")  # torch says that there is no driver
    for check in CHECKS[group]:
        device.begin()
        started, error = time.perf_counter(), ""
        try:
            check(device)
        except Exception:
            error = traceback.format_exc(limit=-4)
        device.begin()
        for monitor in list(gradwatch.monitor.attached.values()):
            monitor.detach()
        seconds = round(time.perf_counter() - started, 2)
        print(json.dumps({"name": check.__name__, "error": error, "seconds": seconds}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
