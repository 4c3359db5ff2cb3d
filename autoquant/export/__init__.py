"""Export a plan: apply it in memory, write it as a folder, and load it through transformers."""
