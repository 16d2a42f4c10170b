"""Advice, followed: what becomes of a faulty training if its user does what the incident says."""
