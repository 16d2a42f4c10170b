"""Rules over rows that are written down: traces and run logs."""
