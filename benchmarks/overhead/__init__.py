"""What watching costs a step, beside `clip_grad_norm_` and other monitors."""
