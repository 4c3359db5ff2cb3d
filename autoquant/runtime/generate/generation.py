"""A `generate` of transformers that replays compiled steps.

`generate` itself stays transformers': it reads the settings, prepares the prompt, logits processors
and stopping criteria, and then calls the model's `_sample`. That one method is replaced. It runs
steps of a `Decoder` and looks at the result of a step only when the next ones have been launched,
so that a GPU never waits for Python. A call that it cannot replay runs in transformers' own way,
with one warning that says why.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoquant.candidates.routed import RoutedWeight
from autoquant.devices import BACKENDS
from autoquant.errors import first_line
from autoquant.records import KvCache
from autoquant.runtime.generate.decoder import Decoder, cache_positions
from autoquant.runtime.generate.kv_codes import kv_cache_of
from autoquant.runtime.generate.loop import Loop

# Each holds a cache for the longest sequence.
_MOST_DECODERS = 4
# A cache is much too long if it is longer than both: this many times what is needed, and this.
_TOO_LONG = 4
_NEVER_TOO_LONG = 4096
_TAKEN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
}
"""The arguments that compiled steps know; any other one is left to transformers."""


def give_fast_generate(model: nn.Module) -> None:
    """Replace how `model` samples, in place.

    It stays an instance of its class, under its class's name.
    """
    if not isinstance(model, _Fast):
        model.__class__ = _class_for(type(model))


class Decoders:
    """The decoders of one model. A copy of the model gets its own."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.lock = threading.RLock()
        self.busy = False
        self._weights: tuple[tuple[int, int], ...] = ()
        self._kept: OrderedDict[tuple[int, int, bool, KvCache | None], Decoder] = OrderedDict()

    def get(self, model: nn.Module, batch: int, tokens: int, *, padded: bool) -> Decoder:
        """Return a decoder with room for `tokens`; one that is much too long would be slower."""
        weights = tuple(map(_identity, model.parameters()))
        if weights != self._weights:
            # The steps were compiled for other weights, and would keep these in memory.
            self._kept.clear()
            self._weights = weights
        longest = max(_TOO_LONG * tokens, _NEVER_TOO_LONG)
        kind = kv_cache_of(model)
        for key, decoder in self._kept.items():
            its_batch, room, *others = key
            same = its_batch == batch and others == [padded, kind]
            if same and tokens <= room <= longest:
                self._kept.move_to_end(key)
                return decoder
        length = cache_positions(tokens)
        decoder = Decoder(model, batch, length, padded=padded, kv_cache=kind)
        self._kept[batch, length, padded, kind] = decoder
        while len(self._kept) > _MOST_DECODERS:
            self._kept.popitem(last=False)
        return decoder

    def __deepcopy__(self, _memo: Any) -> Decoders:
        return Decoders()

    def __reduce__(self) -> Any:
        return Decoders, ()


def _identity(weight: torch.Tensor) -> tuple[int, int]:
    """Return what changes if a weight is replaced, or moved in memory."""
    return id(weight), id(weight.stored) if isinstance(weight, RoutedWeight) else weight.data_ptr()


def decoders_of(model: nn.Module) -> Decoders:
    """Return the model's decoders."""
    found = model.__dict__.get("_autoquant_decoders")
    if not isinstance(found, Decoders):
        found = model.__dict__["_autoquant_decoders"] = Decoders()
    return found


class _Fast:
    """A mixin for the class of a model."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Have pickle find the model's own class: this one is made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _made_again, (type(self).__bases__[1],), *reduced[2:]

    def _sample(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        _check_ids(self, input_ids)
        decoders = decoders_of(self)
        with decoders.lock:  # a decoder has one cache
            decoder, reason = _decoder_for(self, input_ids, kwargs)
            if decoder is not None:
                decoders.busy = True
                try:
                    with torch.no_grad():
                        result = Loop(decoder, input_ids, **kwargs).run()
                finally:
                    decoders.busy = False
                _warn(self, decoder.note)
                return result
        _warn(self, _plain_words(self, reason))
        return super()._sample(input_ids, **kwargs)  # type: ignore[misc]


def _check_ids(model: Any, ids: torch.Tensor) -> None:
    """Refuse token ids that the model has no embeddings for.

    Compiled code would end the process at such an id, on a CPU and on a GPU.

    Raises:
        IndexError: There is one.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None or not ids.numel():
        return
    least, largest = (int(end) for end in torch.aminmax(ids))
    if least < 0 or largest >= rows:
        wrong = least if least < 0 else largest
        raise IndexError(f"token id {wrong} in the prompt: the model has embeddings for {rows} ids")


def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a model with the fast `generate`; the same for the same class."""
    if kind not in _classes:
        # Under the class's own name, which transformers writes into a saved configuration.
        members: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        for name, what in _PLAIN.items():
            members[name] = _plainly(getattr(kind, name), what)
        _classes[kind] = type(kind.__name__, (_Fast, kind), members)
    return _classes[kind]


def _made_again(kind: type[nn.Module]) -> nn.Module:
    made = _class_for(kind)
    return made.__new__(made)


_classes: dict[type[nn.Module], type[nn.Module]] = {}
_PLAIN = {"_beam_search": "beam search", "_assisted_decoding": "assisted decoding"}


def _plainly(method: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return the method of transformers with a warning before it."""

    @functools.wraps(method)  # `generate` looks at the signature
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn(self, _plain_words(self, f"{what} is not replayed"))
        return method(self, *args, **kwargs)

    return run


def _plain_words(model: nn.Module, reason: str) -> str:
    """Return a warning that a call runs as in transformers."""
    kind = kv_cache_of(model)
    kept = f", keys and values are kept in the model's dtype and not in {kind}" if kind else ""
    return f"generate runs as transformers does it, which is slower{kept}: {reason}"


def _warn(model: nn.Module, text: str) -> None:
    warned = decoders_of(model).warned
    if text and text not in warned:
        warned.add(text)
        warnings.warn(f"autoquant: {text}", stacklevel=5)


def _decoder_for(
    model: nn.Module, input_ids: torch.Tensor, kwargs: Mapping[str, Any]
) -> tuple[Decoder | None, str]:
    """Return a decoder for the call, or None and the reason."""
    decoders = decoders_of(model)
    if decoders.busy:
        return None, "it is called within another generate"
    if reason := _plain_reason(model, input_ids, kwargs):
        return None, reason
    padded = kwargs.get("attention_mask") is not None
    limit = kwargs["stopping_criteria"].max_length
    try:
        return decoders.get(model, input_ids.shape[0], limit, padded=padded), ""
    except Exception as error:  # noqa: BLE001 - after any error, transformers' own way is left
        reason = first_line(error, with_type=True)
        return None, f"its steps cannot be run over a static cache: {reason}"


def _plain_reason(model: Any, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> str:
    """Return why a call cannot be replayed; empty if it can."""
    config = kwargs["generation_config"]
    outputs = ("output_attentions", "output_hidden_states")
    asked = [name for name in outputs if getattr(config, name)]
    if asked and config.return_dict_in_generate:
        return f"{' and '.join(asked)} was asked for"
    given = [name for name, value in kwargs.items() if value is not None]
    if unknown := [name for name in given if name not in _TAKEN]:
        return f"{', '.join(unknown)} was given"
    if config.disable_compile:
        return "disable_compile was asked for"
    if not kwargs.get("use_cache", True) or kwargs.get("synced_gpus"):
        return "it runs without a cache, or on several GPUs in step"
    if kwargs["stopping_criteria"].max_length is None:
        return "no maximal length is set"
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return "positions have several dimensions"
    if any(map(_has_hooks, model.modules())):
        return "a module has hooks, which compiled steps do not call"
    return _place_reason(model, input_ids) or _cache_reason(kwargs.get("past_key_values"))


def _has_hooks(module: nn.Module) -> bool:
    """Check for the user's own hooks: transformers' stay after hidden states were given."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _place_reason(model: Any, input_ids: torch.Tensor) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return "the model is spread over several devices"
    device = devices.pop()
    if device.type not in {each.type for each in BACKENDS if each.replays_steps}:
        return f"steps are not compiled for {device.type}"
    if input_ids.device != device:
        return f"input_ids are on {input_ids.device} and the model is on {device}: move them there"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return "the model is in training mode" if model.training else ""


def _cache_reason(cache: Any) -> str:
    """Return why a cache cannot be replaced by a static one."""
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicLayer, StaticLayer

    if cache is None:
        return ""
    if type(cache) not in (DynamicCache, StaticCache):
        return f"it keeps a {type(cache).__name__}"
    others = [layer for layer in cache.layers if not isinstance(layer, (DynamicLayer, StaticLayer))]
    if others:
        return f"it keeps a {type(others[0]).__name__}"
    given = getattr(cache, "_is_user_defined", False) or _is_filled(cache)
    return "past_key_values were given" if given else ""


def _is_filled(cache: Any) -> bool:
    return bool(cache.get_seq_length() > 0)
