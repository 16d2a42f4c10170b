"""When to clip, how tight, when to let go, and what it did."""
