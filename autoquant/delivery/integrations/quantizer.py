"""A quantizer for transformers: `from_pretrained` of a folder that `autoquant apply` wrote.

transformers builds the module that `config.json` names, without memory. It would then read
`model.safetensors` tensor by tensor. Here it finds nothing to read, and
`autoquant.delivery.checkpoint` fills the module, as it does for `autoquant.load`. The source of the
model in `autoquant.json` is ignored, so that no file can choose the code that is run.
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
    """The `quantization_config` of a `config.json`. All other settings are in `autoquant.json`."""

    def __init__(self, format_version: int = 1, **_others: Any) -> None:
        self.quant_method = _METHOD
        self.format_version = format_version


@register_quantizer(_METHOD)
class AutoquantQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Fills the module that transformers built, and prepares it to run."""

    requires_calibration = True  # tells transformers that it cannot quantize while loading
    _folder: Path
    _device: str

    def validate_environment(self, *_args: Any, device_map: Any = None, **_options: Any) -> None:
        """Refuse to spread the model over several devices."""
        from autoquant.errors import DeviceError

        is_map = isinstance(device_map, dict)
        places = set(map(str, device_map.values())) if is_map else {device_map}
        if len(places) != 1 or places & {"balanced", "balanced_low_0", "sequential", "disk"}:
            raise DeviceError(
                f"a model that autoquant quantized runs on one device: give {_PLACES}"
            )

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """Return a map of everything to one device, or None for the CPU."""
        if device_map is None:
            return None
        from autoquant.models.targets import resolve_device

        if device_map == "auto":
            return {"": resolve_device("auto")}
        return {"": next(iter(device_map.values()))}

    def _process_model_before_weight_loading(
        self, model: Any, *, device_map: Any, checkpoint_files: list[str], **_options: Any
    ) -> None:
        from autoquant.delivery.manifest import read_manifest

        self._folder = _whole_folder(Path(checkpoint_files[0]), str(model.config.name_or_path))
        self._device = _device_name((device_map or {"": "cpu"})[""])
        _check_dtype(read_manifest(self._folder)["dtype"], model.dtype)
        _leave_nothing_to_load(model)

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        from autoquant.delivery import checkpoint
        from autoquant.delivery.integrations.saving import settle_loaded
        from autoquant.delivery.kernel_check import check_kernels
        from autoquant.delivery.manifest import read_manifest
        from autoquant.models.loaded import settle
        from autoquant.runtime.prepare import prepare

        del model.state_dict, model._keys_to_ignore_on_load_unexpected
        checkpoint.fill(model, self._folder, self._device)
        manifest = read_manifest(self._folder)
        model = settle_loaded(settle(model), manifest)
        check_kernels(prepare(model, kv_cache=manifest.get("kv_cache")))
        return model

    def is_serializable(self) -> bool:
        """Return True: it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained beside quantized weights, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: `torch.compile` takes it."""
        return True


def _device_name(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _check_dtype(planned: str, asked: torch.dtype) -> None:
    from autoquant.errors import CheckpointError

    if str(asked).removeprefix("torch.") != planned:
        raise CheckpointError(
            f'this model was quantized for {planned}: leave out dtype, or give dtype="{planned}"'
        )


def _leave_nothing_to_load(model: Any) -> None:
    """Make the module look complete, so that transformers reads no tensor and reports none missing.

    Attributes set on the instance are deleted again once the module has been filled.
    """
    model.state_dict = dict
    model._keys_to_ignore_on_load_unexpected = {""}
    model.all_tied_weights_keys = {}  # a plan may untie weights: the manifest has the ties
    for part in model.modules():
        part._is_hf_initialized = True


def _whole_folder(weights: Path, name: str) -> Path:
    """Return the folder of a checkpoint, complete.

    Of a checkpoint on the hub, transformers fetches only the files that it knows. The others are
    fetched here.

    Raises:
        CheckpointError: The folder's index names weights of another folder.
    """
    from autoquant.delivery.manifest import MANIFEST, read_manifest
    from autoquant.delivery.shards import PACKED
    from autoquant.errors import CheckpointError

    folder = weights.parent
    if Path(name).is_dir() and not folder.samefile(name):
        raise CheckpointError(f"{name} names weights of another folder, {folder}: apply again")
    if (folder / MANIFEST).exists() or Path(name).exists():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hf_hub_download(name, MANIFEST, revision=folder.name)
    for file in read_manifest(folder).get("packed", [PACKED]):
        with suppress(EntryNotFoundError):  # absent if every tensor is in model.safetensors
            hf_hub_download(name, file, revision=folder.name)
    return folder
