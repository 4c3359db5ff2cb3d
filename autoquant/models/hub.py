"""Fetch models from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from autoquant.errors import ModelError, first_line
from autoquant.hints import did_you_mean_path
from autoquant.models import weights
from autoquant.models.quiet import no_progress_bars

_DOWNLOADED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]


def download(name: str, *, with_code: bool = False) -> Path:
    """Return a model's folder in the hub's cache; fetch the model first if needed.

    Args:
        with_code: Also fetch its Python files.

    Raises:
        ModelError: The hub cannot be reached, has no such model, or does not let this user have it.
    """
    from huggingface_hub import snapshot_download

    wanted = [*_DOWNLOADED, "*.py"] if with_code else _DOWNLOADED
    try:
        with no_progress_bars():
            folder = Path(snapshot_download(name, allow_patterns=wanted))
            if weights.any_files(folder):
                return folder
            return Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder here{did_you_mean_path(name)} nor a model that can be"
            f" fetched from the hub ({first_line(error)}): check the spelling and the network, or"
            " give a folder"
        ) from error
