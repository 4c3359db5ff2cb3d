"""`python -m autoquant`."""

from autoquant.cli.main import run

run()
