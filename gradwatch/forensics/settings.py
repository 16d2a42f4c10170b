"""How much the forensics of a monitor may do."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "on", "lines", "wait"]
