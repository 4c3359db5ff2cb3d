"""Ranges of the numbers in records. What is read from a file is held to them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from annotated_types import Ge, Le

_LARGEST = 2**63 - 1  # what a database can hold
_HUGE, _TINY = 1e100, 1e-100  # sums and ratios of numbers between them are finite

Count: TypeAlias = Annotated[int, Ge(0), Le(_LARGEST)]
Positive: TypeAlias = Annotated[int, Ge(1), Le(_LARGEST)]
Finite: TypeAlias = Annotated[float, Ge(-_HUGE), Le(_HUGE)]
"""Neither NaN nor infinite, nor so large that sums of them would be."""
NonNegative: TypeAlias = Annotated[float, Ge(0), Le(_HUGE)]
AboveZero: TypeAlias = Annotated[float, Ge(_TINY), Le(_HUGE)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
