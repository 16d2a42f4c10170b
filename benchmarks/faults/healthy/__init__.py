"""Trainings with nothing wrong, each with something that looks wrong."""
