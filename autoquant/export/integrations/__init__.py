"""Other libraries' own ways to load and save a model, taught to handle a folder that `autoquant apply` wrote."""
