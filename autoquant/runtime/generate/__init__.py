"""A `generate` that replays its steps, for causal language models of transformers."""
