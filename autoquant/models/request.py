"""The model that the user asks for, and the source of a loaded one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from autoquant.errors import ModelError
from autoquant.models.targets import resolve_device, resolve_dtype

SourceKind = Literal["huggingface", "state_dict", "exported", "pickle", "live"]
ModelPath: TypeAlias = str | os.PathLike[str]
SampleInputs: TypeAlias = Sequence[Any] | Mapping[str, Any] | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The source of a model. The store keeps it as `dataclasses.asdict` gives it.

    Attributes:
        path: Absolute path of the file or folder, or a name on the hub; empty for a live module.
        model_factory: `package.module:callable` that built the module.
        tokenizer: Path of a tokenizer that is kept elsewhere than the model.
        trust_pickle: Whether the user allowed the file to run code.
        sample_inputs: `package.module:callable` that made the example inputs.
        trust_remote_code: Whether the user allowed code that lies beside the model to run.
        file_hash: SHA-256 of a file that was trusted, else None.
        code_hash: SHA-256 of code beside the model that was trusted, else None.
    """

    kind: SourceKind
    path: str = ""
    model_factory: str | None = None
    tokenizer: str | None = None
    trust_pickle: bool = False
    sample_inputs: str | None = None
    trust_remote_code: bool = False
    file_hash: str | None = None
    code_hash: str | None = None

    def request(self, *, dtype: str, device: str, model: ModelPath | None = None) -> ModelRequest:
        """Return what loads the model again.

        Args:
            model: Where the model lies now; None if it was not moved.
        """
        return ModelRequest(
            model=self.path if model is None else model,
            dtype=dtype,
            device=device,
            model_factory=self.model_factory,
            tokenizer=self.tokenizer,
            trust_pickle=self.trust_pickle,
            sample_inputs=self.sample_inputs,
            trust_remote_code=self.trust_remote_code,
            file_hash=self.file_hash,
            code_hash=self.code_hash,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """A model to load, with the options of loading it.

    Attributes:
        model: One of

            - a Hugging Face folder of a causal language model, or its name on the hub (`org/name`)
            - a state dict (`.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`), with the `config.json`
              of such a model beside it or a `model_factory`
            - an exported program (`.pt2`, `.pt`)
            - a pickled module (`.pt`)
            - a live module.
        dtype: auto (as stored), fp32, bf16, fp16 or fast16; see `resolve_dtype`.
        device: auto, cpu, cuda, cuda:INDEX or mps; never auto once the request is made.
        model_factory: `package.module:callable` that returns the module of a state dict. The
            current directory is searched, too.
        tokenizer: A tokenizer folder or a `tokenizer.json`; for a live module also the object.
            A Hugging Face folder brings its own.
        trust_pickle: Allow the file to run code on loading. Otherwise no code of it is ever run.
        sample_inputs: Arguments of one forward pass, positional or by name, or
            `package.module:callable` that returns them. Only for a model that is no language model.
        trust_remote_code: Allow the code that a Hugging Face folder brings (`auto_map`) to run.
        file_hash: SHA-256 that a trusted file must have; None if it is not known yet.
        code_hash: SHA-256 that trusted code beside the model must have; None if it is not known.

    Raises:
        DeviceError: The device is not there.
        WorkloadError: The dtype is unknown.
        ModelError: A tokenizer object is given for a model that is not live.
    """

    model: ModelPath | nn.Module
    dtype: str = "auto"
    device: str = "auto"
    model_factory: str | None = None
    tokenizer: Any | None = None
    trust_pickle: bool = False
    sample_inputs: SampleInputs = None
    trust_remote_code: bool = False
    file_hash: str | None = None
    code_hash: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", resolve_device(self.device))
        resolve_dtype(self.dtype, "cpu", torch.float32)  # a typo should not wait for the weights
        is_object = not isinstance(self.tokenizer, (str, os.PathLike, type(None)))
        if is_object and not isinstance(self.model, nn.Module):
            raise ModelError(
                "a model that is loaded from a path needs its tokenizer as a path, too: save the"
                " tokenizer with save_pretrained() and give that folder"
            )

    @property
    def name(self) -> str:
        """The model as the user wrote it; empty for a live module."""
        return "" if isinstance(self.model, nn.Module) else os.fspath(self.model)

    def source(self, kind: SourceKind, path: str) -> ModelSource:
        """Return how to load the same model again."""
        return ModelSource(
            kind=kind,
            path=path,
            model_factory=self.model_factory,
            tokenizer=self._tokenizer_path(),
            trust_pickle=self.trust_pickle,
            sample_inputs=self.sample_inputs if isinstance(self.sample_inputs, str) else None,
            trust_remote_code=self.trust_remote_code,
            file_hash=self.file_hash,
            code_hash=self.code_hash,
        )

    def _tokenizer_path(self) -> str | None:
        if self.tokenizer is None:
            return None
        return str(Path(self.tokenizer).expanduser().absolute())
