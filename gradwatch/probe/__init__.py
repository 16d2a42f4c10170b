"""What sits on the model and its optimizer, and makes one row just before each update."""
