"""Load a model from what users have: the only place that knows file formats."""

from autoquant.models.content import content_hash
from autoquant.models.load import from_module, load_model, load_request
from autoquant.models.loaded import LoadedModel
from autoquant.models.request import ModelRequest, ModelSource
from autoquant.models.same import SameModel
from autoquant.models.targets import dtype_name, resolve_device, resolve_dtype

__all__ = [
    "LoadedModel",
    "ModelRequest",
    "ModelSource",
    "SameModel",
    "content_hash",
    "dtype_name",
    "from_module",
    "load_model",
    "load_request",
    "resolve_device",
    "resolve_dtype",
]
