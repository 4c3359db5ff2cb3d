"""A tiny model and what a plan made of it, as folders."""

from __future__ import annotations

import pytest
from end_to_end.applied import save_both


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """(folder of the unquantized model, folder of the quantized one)."""
    return save_both(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="session")
def quantized(both):
    return both[1]
