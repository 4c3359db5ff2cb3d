"""How weights are stored: one module for each family of formats, with its tensors and products."""
