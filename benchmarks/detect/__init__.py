"""What is found, what is not, and what is found where there is nothing."""
