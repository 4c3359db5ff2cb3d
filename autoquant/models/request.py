"""What the user asked `load_model` for, handed to the reader of each format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.models.loaded import ModelSource, SourceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of `load_model`; `device` is resolved, `dtype` is not (it depends on what is stored).

    Attributes:
        sample_inputs: `package.module:callable`, or the inputs themselves.
    """

    name: str
    dtype: str
    device: str
    model_factory: str | None
    tokenizer: str | None
    trust_pickle: bool
    sample_inputs: Any | None = None

    def source(self, kind: SourceKind, path: str) -> ModelSource:
        """How to load the same model again."""
        return ModelSource(
            kind=kind,
            path=path,
            model_factory=self.model_factory,
            tokenizer=None if self.tokenizer is None else str(Path(self.tokenizer).expanduser().absolute()),
            trust_pickle=self.trust_pickle,
            sample_inputs=self.sample_inputs if isinstance(self.sample_inputs, str) else None,
        )
