"""Models, and what changes of single layers cost them in quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from autoquant.store.schema import (
    LossRow,
    ModelRow,
)
from autoquant.store.transactions import Transactions


class Losses(Transactions):
    """What a model is, and what its layers lose."""

    def put_model(self, model_hash: str, source: Mapping[str, Any]) -> None:
        with self._writing() as session:
            session.merge(ModelRow(hash=model_hash, source=dict(source)))

    def losses(
        self, model_hash: str, quality_key: str, method: str
    ) -> dict[tuple[str, str], float]:
        """Return the losses of single layers by (layer, numerics)."""
        with self._session() as session:
            rows = session.scalars(
                select(LossRow).filter_by(
                    model_hash=model_hash, quality_key=quality_key, method=method
                )
            )
            return {(row.layer, row.numerics): row.loss for row in rows}

    def put_losses(
        self,
        model_hash: str,
        quality_key: str,
        method: str,
        losses: Mapping[tuple[str, str], float],
    ) -> None:
        """Save the losses of one pass over the text, all or none of them.

        What another process has saved meanwhile stays.
        """
        of = {"model_hash": model_hash, "quality_key": quality_key, "method": method}
        with self._writing() as session:
            for (layer, numerics), loss in losses.items():
                key = {**of, "layer": layer, "numerics": numerics}
                if session.scalars(select(LossRow).filter_by(**key)).first() is None:
                    session.add(LossRow(**key, loss=loss))
