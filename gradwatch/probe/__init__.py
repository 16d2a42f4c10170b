"""The hooks on a model and its optimizers, which make one row just before each update."""
