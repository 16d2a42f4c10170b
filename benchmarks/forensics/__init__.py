"""Which operation made the first NaN: programs that fail, and what gradwatch and other tools say about them."""
