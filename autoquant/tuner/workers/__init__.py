"""The processes that do a search's work: this one, or others that may crash."""
