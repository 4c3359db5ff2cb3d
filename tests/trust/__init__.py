"""Files that try to make code run. None may, unless a person names it in the command."""
