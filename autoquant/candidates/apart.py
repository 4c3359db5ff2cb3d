"""What modules whose weights were taken apart have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Apart(nn.Module):
    """A module that finds the tensors inside its weights again after a move and a copy.

    Attributes:
        found_again: Names of what `take_apart` finds. They are not copied or saved.
    """

    found_again: ClassVar[tuple[str, ...]] = ()

    def take_apart(self) -> None:
        """Find the tensors inside the weights."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.take_apart()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in self.found_again
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.take_apart()
