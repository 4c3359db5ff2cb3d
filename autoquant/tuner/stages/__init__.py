"""The stages of a search, each a function that takes what it needs and returns what it made."""
