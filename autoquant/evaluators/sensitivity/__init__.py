"""How much each change of each layer will cost: sensitivities, all with the same interface.

- `isolated` measures every change alone (the reference);
- `fisher` predicts all of them to second order from a few backward passes;
- `path` attributes the true divergence of a model whose layers are all changed to its layers.
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
