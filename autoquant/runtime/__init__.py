"""Whole models: run, compiled, timed, and made fast in the user's own loop (`prepare`)."""
