"""autoquant among transformers' quantizers: `from_pretrained` of a folder that `autoquant apply` wrote.

transformers makes the module without memory and would then read `model.safetensors` tensor by tensor. Here it finds nothing to
read: the module is filled by `autoquant.export.checkpoint`, as `autoquant.load` does, with the class that `config.json` names.
Nothing that `autoquant.json` says about where the model came from is used, so no code is found by what a file says.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch

_METHOD = "autoquant"
_PLACES = 'device_map="cpu", "cuda", "cuda:1", {"": 0}, or "auto" for the best device'


@register_quantization_config(_METHOD)
class AutoquantConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The `quantization_config` of a `config.json`: everything else stands in `autoquant.json`."""

    def __init__(self, format_version: int = 1, **_others: Any) -> None:
        self.quant_method = _METHOD
        self.format_version = format_version


@register_quantizer(_METHOD)
class AutoquantQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Fills the module that transformers made, and prepares it to run."""

    requires_calibration = True  # transformers' word for: cannot quantize while it loads
    _folder: Path
    _device: str

    def validate_environment(self, *_args: Any, device_map: Any = None, **_options: Any) -> None:
        """Refuse to spread the model over several devices."""
        from autoquant.errors import DeviceError

        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else {device_map}
        if len(places) != 1 or places & {"balanced", "balanced_low_0", "sequential", "disk"}:
            raise DeviceError(f"a model that autoquant quantized runs on one device: give {_PLACES}")

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """One device for everything; None for the CPU."""
        if device_map is None:
            return None
        from autoquant.models.targets import resolve_device

        return {"": resolve_device("auto") if device_map == "auto" else next(iter(device_map.values()))}

    def _process_model_before_weight_loading(
        self, model: Any, *, device_map: Any, checkpoint_files: list[str], **_options: Any
    ) -> None:
        from autoquant.export.checkpoint import read_manifest

        self._folder = _whole_folder(Path(checkpoint_files[0]), str(model.config.name_or_path))
        self._device = _device_name((device_map or {"": "cpu"})[""])
        _check_dtype(read_manifest(self._folder)["dtype"], model.dtype)
        _leave_nothing_to_load(model)

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        from autoquant.export import checkpoint
        from autoquant.export.integrations.saving import settle_loaded
        from autoquant.models.loaded import settle

        del model.state_dict, model._keys_to_ignore_on_load_unexpected
        checkpoint.fill(model, self._folder, self._device)
        return settle_loaded(settle(model), checkpoint.read_manifest(self._folder))

    def is_serializable(self) -> bool:
        """Whether it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether its quantized weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes it."""
        return True


def _device_name(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _check_dtype(planned: str, asked: torch.dtype) -> None:
    from autoquant.errors import CheckpointError

    if str(asked).removeprefix("torch.") != planned:
        raise CheckpointError(f'this model was quantized for {planned}: leave out dtype, or give dtype="{planned}"')


def _leave_nothing_to_load(model: Any) -> None:
    """Have transformers' loader find a module that is complete: nothing is read, made up or reported as missing.

    What is set here on the instance is taken away again when the module has been filled.
    """
    model.state_dict = dict
    model._keys_to_ignore_on_load_unexpected = {""}
    model.all_tied_weights_keys = {}  # a plan may part tied weights: what is tied stands in the manifest
    for part in model.modules():
        part._is_hf_initialized = True


def _whole_folder(weights: Path, name: str) -> Path:
    """The folder of a checkpoint; of one on the hub, of which transformers fetched its own files, with the others."""
    from autoquant.export.checkpoint import MANIFEST, PACKED

    folder = weights.parent
    if (folder / MANIFEST).exists() or Path(name).exists():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hf_hub_download(name, MANIFEST, revision=folder.name)
    with suppress(EntryNotFoundError):  # every tensor fitted into model.safetensors
        hf_hub_download(name, PACKED, revision=folder.name)
    return folder
