"""A plan put into a model: in memory, as a folder, and by transformers' own loading and saving."""
