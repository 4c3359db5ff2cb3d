"""Make the GGUF of an unquantized model from its Hugging Face folder.

It is what an export begins with if the user has none. Only architectures are converted whose names,
orders of rows and settings were compared with llama.cpp's own results, see `studies/engines/gguf`.
What each architecture reads lies in llama.cpp's `src/models`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoquant.delivery.beside import source_folder
from autoquant.delivery.targets.gguf_vocab import Vocab
from autoquant.delivery.targets.huggingface import check_folder_model
from autoquant.errors import PlanError
from autoquant.models import LoadedModel, weights

_KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")
_GIVE_BASE = (
    "give a GGUF of the unquantized model as --base (`convert_hf_to_gguf.py MODEL --outtype bf16`"
    " of llama.cpp may write one)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """What llama.cpp makes of a class of transformers.

    Attributes:
        name: As llama.cpp calls it.
        pairs_rows: It turns neighbouring rows of queries and keys, not those half a head apart.
        fixed: Fields of a configuration that it does not read, and the only values it computes. A
            field that is not there has the first.
    """

    name: str
    pairs_rows: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SILU = {"hidden_act": ("silu",)}
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(name="llama", pairs_rows=True, fixed=_SILU),
    "MistralForCausalLM": _Architecture(name="llama", pairs_rows=True, fixed=_SILU),
    "Qwen2ForCausalLM": _Architecture(name="qwen2", fixed=_SILU),
    "Qwen3ForCausalLM": _Architecture(name="qwen3", fixed=_SILU | {"attention_bias": (False,)}),
}
"""By class of transformers. For an architecture that is not here, llama.cpp's converter is used."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model that is converted here. The tables of its tokenizer are made once.

    Attributes:
        kind: What llama.cpp makes of its class.
    """

    loaded: LoadedModel
    kind: _Architecture
    vocab: Vocab

    @classmethod
    def of(cls, loaded: LoadedModel) -> Conversion:
        """Return how a model is converted, before any work.

        Raises:
            PlanError: Its architecture, a setting or its tokenizer is not known, or it is no
                language model of transformers.
        """
        kind = _architecture(loaded)
        _rope(loaded.module.config)
        vocab = _vocab(loaded)
        check_folder_model(loaded, "gguf")
        return cls(loaded, kind, vocab)

    @property
    def notes(self) -> tuple[str, ...]:
        """What llama.cpp computes otherwise than the model's folder says, a line each."""
        config: Any = self.loaded.module.config
        window = getattr(config, "sliding_window", None)
        used = getattr(config, "use_sliding_window", True)
        if not used or not isinstance(window, int) or window >= config.max_position_embeddings:
            return self.vocab.notes
        return (
            f"llama.cpp attends to all tokens, where the model attends to the last {window}: longer"
            " texts are read otherwise",
            *self.vocab.notes,
        )

    def write(self, dtype: str, path: Path) -> None:
        """Write the GGUF, with matrices in a dtype and vectors in float32.

        The weights are read from the model's files, so it may be quantized by now.

        Args:
            dtype: E.g. `bfloat16`.
        """
        import gguf

        config: Any = self.loaded.module.config
        # Tensors wait in a temporary file, so that a large model need not fit into memory.
        writer: Any = gguf.GGUFWriter(path, self.kind.name, use_temp_file=True)
        writer.add_type("model")
        writer.add_name(Path(self.loaded.source.path).name)
        _add_settings(writer, config)
        self.vocab.write(writer)
        writer.add_file_type(gguf.LlamaFileType[_file_type(dtype)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in _tensors(self.loaded, self.kind, dtype):
            own = gguf.GGMLQuantizationType[_KINDS[dtype] if tensor.ndim > 1 else "F32"]
            data = gguf.quants.quantize(tensor.float().numpy(), own)
            writer.add_tensor(name, data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _file_type(dtype: str) -> str:
    return "ALL_F32" if dtype == "float32" else f"MOSTLY_{_KINDS[dtype]}"


def _architecture(loaded: LoadedModel) -> _Architecture:
    """Return what llama.cpp makes of a model.

    Raises:
        PlanError: It is not known, or computes the model otherwise than its settings say.
    """
    name = type(loaded.module).__name__
    if name not in _ARCHITECTURES:
        raise PlanError(
            f"no GGUF is made here of a {name}, only of {', '.join(_ARCHITECTURES)}: {_GIVE_BASE}"
        )
    kind = _ARCHITECTURES[name]
    config = loaded.module.config
    other = [
        f"{key}={getattr(config, key)}"
        for key, values in kind.fixed.items()
        if getattr(config, key, values[0]) not in values
    ]
    if other:
        raise PlanError(f"llama.cpp does not compute {name} with {', '.join(other)}")
    return kind


def _vocab(loaded: LoadedModel) -> Vocab:
    if loaded.tokenizer is None:
        raise PlanError("a GGUF needs the model's tokenizer, which its folder lacks")
    return Vocab(
        loaded.tokenizer, loaded.module.config, getattr(loaded.module, "generation_config", None)
    )


def _add_settings(writer: Any, config: Any) -> None:
    """Write what a model's configuration says."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


_ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Kinds of rotary embeddings that are converted, and the settings that each may have."""


def _rope(config: Any) -> dict[str, Any]:
    """Return the settings of rotary embeddings.

    Raises:
        PlanError: llama.cpp is not told of such ones here.
    """
    rope = {key: value for key, value in dict(config.rope_parameters).items() if value is not None}
    rope.pop("type", None)  # older name of `rope_type`
    kind = rope.setdefault("rope_type", "default")
    known = ("rope_type", "rope_theta", *_ROPE_KINDS.get(kind, ()))
    if kind not in _ROPE_KINDS or any(key not in known for key in rope):
        settings = ", ".join(f"{key}={value}" for key, value in rope.items())
        raise PlanError(f"no GGUF is made here with rotary embeddings of {settings}: {_GIVE_BASE}")
    return rope


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Return `[head_dim / 2]`: by what the wavelength of each pair of a head grows.

    Short waves stay, long ones grow by the factor, and those between by something between, as in
    transformers' `modeling_rope_utils.py`.
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** powers
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.float()


def _tensors(
    loaded: LoadedModel, kind: _Architecture, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors by their names in a GGUF, with rows in its order."""
    import gguf

    config: Any = loaded.module.config
    number = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[kind.name]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, stored in _stored(loaded):
        tensor = stored.to(getattr(torch, dtype))
        if name == "lm_head.weight" and tied:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise PlanError(f"a GGUF of {kind.name} has no place for {name}: {_GIVE_BASE}")
        found = _PAIRED.search(name)
        yield there, _neighbours(tensor, heads[found[1]]) if found and kind.pairs_rows else tensor
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads["q"]
        yield "rope_freqs.weight", _llama3_factors(rope, head_dim)


def _neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows that are half a head apart beside each other."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _stored(loaded: LoadedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model's files that the model has."""
    folder = source_folder(loaded)
    assert folder is not None  # `check_folder_model` refused that
    paths = weights.files(folder)
    safe = paths[0].suffix == ".safetensors"
    pairs = weights.read_safetensors(paths) if safe else iter(weights.read_bins(paths).items())
    known = set(loaded.module.state_dict())
    return ((name, tensor) for name, tensor in pairs if name in known)
