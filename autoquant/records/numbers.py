"""Ranges of the numbers in records. What is read from a file is held to them."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

_LARGEST = 2**63 - 1  # what a database can hold

Count: TypeAlias = Annotated[int, Ge(0), Le(_LARGEST)]
Positive: TypeAlias = Annotated[int, Ge(1), Le(_LARGEST)]
Finite: TypeAlias = Annotated[float, Gt(-math.inf), Lt(math.inf)]
"""Neither infinite nor NaN."""
NonNegative: TypeAlias = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero: TypeAlias = Annotated[float, Gt(0), Lt(math.inf)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
