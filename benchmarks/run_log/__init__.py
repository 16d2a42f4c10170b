"""What a run log costs, in time and on the disk."""
