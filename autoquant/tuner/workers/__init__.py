"""The processes that do the search's work: this one, or others that may crash and return their memory."""
