"""Formats of stored weights: a module for each family, with its tensors and products."""
