"""Healthy trainings whose signal is rare, comes in bursts or changes scale, judged by data held out."""
