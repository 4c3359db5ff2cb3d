"""Formats, kernels, and the one ordered registry of them."""

from autoquant.candidates.base import (
    A8_FLOAT8_ROW,
    A8_FLOAT8_TENSOR,
    A8_ROW,
    A16,
    ACTIVATION_ROUNDING,
    Candidate,
    Format,
    Kernel,
    activation_rounding,
    multiplied_numbers,
)
from autoquant.candidates.inputs import InputStatistics
from autoquant.candidates.registry import (
    CandidateStatus,
    candidate_of,
    get_format,
    known_formats,
    register,
    select,
    survey,
    timed,
    timed_as,
)

__all__ = [
    "A8_FLOAT8_ROW",
    "A8_FLOAT8_TENSOR",
    "A8_ROW",
    "A16",
    "ACTIVATION_ROUNDING",
    "Candidate",
    "CandidateStatus",
    "Format",
    "InputStatistics",
    "Kernel",
    "activation_rounding",
    "candidate_of",
    "get_format",
    "known_formats",
    "multiplied_numbers",
    "register",
    "select",
    "survey",
    "timed",
    "timed_as",
]
