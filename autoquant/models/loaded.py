"""A loaded model: ready to run, with its identity, source and kind."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from autoquant.models.families import Family
from autoquant.models.request import ModelSource
from autoquant.models.streaming import Stream, stream_of
from autoquant.models.targets import dtype_name

if TYPE_CHECKING:
    from autoquant.models.reader import Reader

ModelKind = Literal["causal_lm", "token_lm", "encoder_decoder", "module"]

# What running a module on inputs that are not meant for it raises.
UNFIT = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


@dataclass(kw_only=True)
class LoadedModel:
    """A module in eval mode, without gradients, on its device and in its dtype.

    The weights of one that is larger than its device are brought there block by block, see
    `autoquant.models.streaming`.

    Attributes:
        content_hash: Of the architecture and of the tensors as stored, before any cast.
        tokenizer: A transformers tokenizer, or what the caller of `from_module` gave.
        kind: One of

            - `causal_lm`: a Hugging Face model that generates with a cache
            - `token_lm`: takes integer ids [batch, tokens] as its only input and returns logits
              [batch, tokens, vocab], bare or as `.logits`
            - `encoder_decoder`: a Hugging Face model that reads an input as a whole, and generates
              with a cache
            - `module`: anything else.
        example_inputs: The arguments of one forward pass, positional or by name: the user's, or
            else those of an exported program. None if there are none. Inputs that a callable or a
            program made are on the device and in the dtype; the user's own tensors do not change.
            A Hugging Face model that reads something else than a causal one has made-up ones.
        max_positions: Longest sequence in tokens, if the configuration says so.
        vocabulary: How many token ids a language model has embeddings for, if that is seen.
        stored_dtype: The dtype that most of the stored weights have, e.g. `bfloat16`.
        notes: A sentence for each part of the file that the model has no place for.
        family: The kind of a Hugging Face model, by the class that its folder names.
        reader: What makes the inputs of one that is judged by something else than perplexity.
    """

    module: nn.Module
    content_hash: str
    source: ModelSource
    tokenizer: Any | None
    kind: ModelKind
    example_inputs: tuple[Any, ...] | dict[str, Any] | None
    max_positions: int | None
    stored_dtype: str
    notes: tuple[str, ...] = ()
    vocabulary: int | None = None
    family: Family | None = None
    reader: Reader | None = None

    @property
    def device(self) -> str:
        """The device that the model computes on, e.g. `cuda:0`; `cpu` without any tensor."""
        return device_of(self.module)

    @property
    def stream(self) -> Stream | None:
        """What brings the weights to the device block by block; None if all of them are there."""
        return stream_of(self.module)

    @property
    def describes_itself(self) -> bool:
        """Whether a checkpoint of the model says how its module is made."""
        return self.source.kind in ("huggingface", "state_dict")

    @property
    def dtype(self) -> str:
        """The dtype that most floating parameters have now; without any, the stored one."""
        return dtype_name(main_dtype(self.module) or getattr(torch, self.stored_dtype))


def device_of(module: nn.Module) -> str:
    """Return the device that a module computes on, e.g. `cuda:0`; `cpu` without any tensor.

    It is where its first parameter or buffer is, or where a streamed module brings its weights.
    """
    if (stream := stream_of(module)) is not None:
        return stream.device
    for tensor in (*module.parameters(), *module.buffers()):
        return str(tensor.device)
    return "cpu"


def main_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of most floating elements of the parameters, else buffers, or None."""
    for tensors in (list(module.parameters()), list(module.buffers())):
        counts: dict[torch.dtype, int] = {}
        for tensor in tensors:
            if tensor.is_floating_point():
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        if counts:
            return max(counts, key=lambda dtype: counts[dtype])
    return None


def settle(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode without gradients, in place.

    An exported program's module refuses `eval()`, since the export fixed its mode. Its `eval` is
    replaced by one that does nothing, so that callers need not know the difference.
    """
    try:
        module.eval()
    except NotImplementedError:
        module.eval = lambda: module  # type: ignore[method-assign]
        for child in module.modules():
            child.training = False
    module.requires_grad_(False)
    return module


def is_transformers(module: nn.Module) -> bool:
    """Check whether `module` is a model of transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def is_causal_lm(module: nn.Module) -> bool:
    """Check whether `module` is a Hugging Face decoder that generates."""
    if not is_transformers(module):
        return False
    model: Any = module
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def is_encoder_decoder(module: nn.Module) -> bool:
    """Check whether `module` is a Hugging Face encoder with a decoder that generates."""
    if not is_transformers(module):
        return False
    model: Any = module
    return bool(model.can_generate()) and bool(getattr(model.config, "is_encoder_decoder", False))


def max_positions(module: nn.Module) -> int | None:
    """Return the longest sequence in tokens that the configuration allows, or None."""
    if not is_causal_lm(module):
        return None
    config: Any = module.config
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
