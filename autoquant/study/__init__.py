"""Read a finished study, compare its plans, solve it again, remove it. No model, no torch."""
