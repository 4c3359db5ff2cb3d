"""The front as a picture, a page and a chart of characters."""
