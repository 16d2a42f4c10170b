"""Of several processes, one row: settings are compared, numbers exchanged, decisions made together."""
