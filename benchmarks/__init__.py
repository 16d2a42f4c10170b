"""Benchmarks, a folder for each command: they print the tables that the README and the docs show."""
