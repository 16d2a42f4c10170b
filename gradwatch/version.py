"""The version of gradwatch, which the build reads from here: a clone that is not installed has no other."""

from __future__ import annotations

VERSION = "0.1.0"
