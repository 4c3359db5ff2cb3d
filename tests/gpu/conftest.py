"""gemlite without its tuning.

What is computed does not depend on it, and it takes seconds for each shape.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def untuned_gemlite():
    if torch.cuda.is_available():
        core = pytest.importorskip("gemlite.core")
        for operator in core.GEMLITE_TRITON_MAPPING.values():
            for kernel in operator.kernel:
                kernel.configs = kernel.configs[:2]
