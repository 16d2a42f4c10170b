"""A step that is left out, for real: parameters, optimizer state and buffers stay as they were, to the bit."""
