"""Sensitivities: the loss of each change of each layer, all with one interface.

- `isolated` measures every change alone, and is the reference;
- `fisher` predicts all changes to second order from a few backward passes;
- `path` divides the true divergence of a model with all layers changed among the layers.
"""

from autoquant.evaluators.sensitivity.base import (
    EVERY_LAYER,
    Change,
    Losses,
    OnScored,
    Sensitivity,
    check_text,
)
from autoquant.evaluators.sensitivity.fisher import FISHER
from autoquant.evaluators.sensitivity.isolated import ISOLATED
from autoquant.evaluators.sensitivity.path import PATH

SENSITIVITIES = {method.id: method for method in (ISOLATED, FISHER, PATH)}

__all__ = [
    "EVERY_LAYER",
    "ISOLATED",
    "PATH",
    "SENSITIVITIES",
    "Change",
    "Losses",
    "OnScored",
    "Sensitivity",
    "check_text",
]
