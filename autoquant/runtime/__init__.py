"""Whole models: run, compiled, timed, and as fast as a plan allows in the user's own loop (`prepare`)."""
