"""Distributed training: compares the settings of all processes and exchanges their numbers, so that all decide alike."""
