"""The changes that CONTRIBUTING.md describes, each made once as a reader would make it."""
