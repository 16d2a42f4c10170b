"""Text for people: numbers and counts as they stand in sentences, and foreign text without control characters."""
