"""Alarms from the values of rules, and incidents from alarms, with a prime suspect and advice. Does not import torch."""
