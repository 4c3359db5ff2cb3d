"""Inference engines that are timed here: how each is found, started, and asked for a request.

An engine is a program of the user's, found and never installed. To add one, subclass `TimedEngine`
in a module of its own, and list it in `TIMED`.
"""

from collections.abc import Mapping

from autoquant.tuner.timed_engines.base import FIRST, REQUEST, Run, TimedEngine, Times
from autoquant.tuner.timed_engines.llama_cpp import LlamaCpp
from autoquant.tuner.timed_engines.vllm_process import Vllm

TIMED: Mapping[str, type[TimedEngine]] = {"llama.cpp": LlamaCpp, "vllm": Vllm}
"""All of them, by the names of `autoquant.engines.ENGINES`."""

__all__ = ["FIRST", "REQUEST", "TIMED", "Run", "TimedEngine", "Times"]
