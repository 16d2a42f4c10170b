"""Analysis of recorded runs: rules over traces and run logs, and the comparison of two runs."""
