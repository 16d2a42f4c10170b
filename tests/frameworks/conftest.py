"""What the test session need not look into."""

from __future__ import annotations

# they hold trainings and no tests, and import libraries that the extra `frameworks` installs
collect_ignore = ["deepspeed_runs.py", "together.py"]
