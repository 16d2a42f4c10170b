"""Alarms from the values of rules, and incidents from alarms, with a prime suspect and advice. Does not import torch."""

from gradwatch.verdict.alarms import Alarms
from gradwatch.verdict.band import Band
from gradwatch.verdict.incidents import Incidents
from gradwatch.verdict.resting import Resting
from gradwatch.verdict.settings import VerdictSettings

__all__ = ["Alarms", "Band", "Incidents", "Resting", "VerdictSettings"]
