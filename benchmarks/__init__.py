"""Benchmarks: they print the tables that the README and the docs show."""
