"""Seeded small trainings: faulty ones, each with its repaired twin, and healthy ones that tempt a detector."""
