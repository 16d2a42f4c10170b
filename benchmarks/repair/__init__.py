"""What repairs a training, and what that costs a healthy one."""
