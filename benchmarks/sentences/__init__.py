"""What gradwatch says: its sentences as real trainings produce them, on one page to read through."""
