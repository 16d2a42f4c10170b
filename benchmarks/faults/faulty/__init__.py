"""Trainings with one fault each, beside a twin in which it is repaired."""
