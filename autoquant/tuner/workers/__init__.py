"""Where the search's work runs: in this process, or in processes that may crash and give their memory back."""
