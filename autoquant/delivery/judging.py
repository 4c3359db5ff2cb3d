"""What judges a model that is about to be delivered. Floors above know how."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from autoquant.models import LoadedModel


class Judge(Protocol):
    """Measures what a delivery costs in quality."""

    def before(self, loaded: LoadedModel) -> None:
        """Take the unquantized model, before a plan is applied to it."""

    def after(self, module: nn.Module) -> None:
        """Judge what was made, as it will be used where that is possible.

        Raises:
            PlanError: It loses too much.
        """
