"""Tables for the terminal, and their rows as JSON."""
