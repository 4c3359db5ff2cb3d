"""Load a model once more, in another process."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoquant.errors import ModelError
from autoquant.models.load import load_request
from autoquant.models.loaded import LoadedModel, ModelKind
from autoquant.models.request import ModelRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SameModel:
    """A request that another process can load, with the identity of the result.

    Attributes:
        content_hash: What the files must still hold.
    """

    request: ModelRequest
    kind: ModelKind
    content_hash: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> SameModel:
        """Describe a model that is not live, in the dtype and on the device that it has now."""
        request = loaded.source.request(dtype=loaded.dtype, device=loaded.device)
        if request.sample_inputs is None:
            # The user gave the inputs themselves, or the file holds them.
            request = replace(request, sample_inputs=loaded.example_inputs)
        return cls(request=request, kind=loaded.kind, content_hash=loaded.content_hash)

    def load(self) -> LoadedModel:
        """Load the model.

        Raises:
            ModelError: It is not there any more, or was changed.
        """
        loaded = load_request(self.request)
        if loaded.content_hash != self.content_hash:
            raise ModelError(f"{self.request.name} was changed while it was searched")
        return replace(loaded, kind=self.kind)
