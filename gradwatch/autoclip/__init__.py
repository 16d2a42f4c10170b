"""Auto-clip: when to clip, with which bounds, when to stop, and what it achieved."""
