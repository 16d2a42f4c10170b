"""Measurement of tensors: norms of gradients and weights, samples of weights, statistics of a batch."""
