"""Leaving out optimizer steps, so that parameters, optimizer state and buffers stay bit-identical."""
