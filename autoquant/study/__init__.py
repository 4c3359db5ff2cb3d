"""What can be done with a finished study: read, compare, solve again, remove. Needs no model and no torch."""
