"""The steps of a causal language model over a static cache: chunks of a prompt, and single tokens.

Each kind of step has fixed shapes. So it is compiled once and, on a GPU, replayed as one CUDA
graph. A prompt is cut into chunks of a few sizes, the largest first, since each chunk unpacks all
weights again. The last chunk is filled up with tokens whose keys and values later tokens overwrite:
the causal mask hides them until then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from autoquant.candidates.kernels.caches import kernels_kept, use_kernel_caches
from autoquant.devices import Division, backend
from autoquant.errors import first_line
from autoquant.records import KvCache
from autoquant.runtime.agreement import unexplained_error
from autoquant.runtime.compiled import compile_forward, ready_to_compile, repeated_blocks
from autoquant.runtime.generate import attention
from autoquant.runtime.generate.cache import StepState, static_cache, takes_made_mask
from autoquant.runtime.generate.choice import Choice, Rule
from autoquant.runtime.parts import as_if_compiled, compile_parts

CHUNKS = (1024, 512, 256, 64)
"""Tokens of a sequence in one step, for prompts."""
# Of the batch and its tokens in one step, which bounds the memory of activations.
_MOST_ROWS = 16384
_SHORTEST_CACHE = 256
# Each keeps a graph of its own.
_MOST_RULES = 8
# A chunk that is at least so full costs less than several smaller ones.
_FILL_FROM = 0.75
_UNPACKED = (
    "each step unpacks all keys and values, which takes longer than to read them in the model's"
    " dtype: no kernel of autoquant's attends to codes for this model here"
)

Step = Callable[[torch.Tensor], torch.Tensor]
"""Token ids `[batch, tokens]` to logits `[batch, 1, vocabulary]`."""
Way = Literal["replayed", "launched", "eager"]
"""How a step runs: compiled (and replayed as a graph, or not), or by the model's own code."""


def cache_positions(tokens: int) -> int:
    """Return the length of the cache for `tokens`: one of two an octave, so few are compiled."""
    length = _SHORTEST_CACHE
    while length < tokens:  # 256, 384, 512, 768, 1024, ...
        is_power_of_two = length & (length - 1) == 0
        length = length * 3 // 2 if is_power_of_two else length // 3 * 4
    return length


def chunks_of(tokens: int, batch: int) -> list[int]:
    """Return the chunks that a prompt is cut into.

    The last one may be longer than what is left of the prompt.
    """
    sizes = [size for size in CHUNKS if size * batch <= _MOST_ROWS] or [CHUNKS[-1]]
    chunks = []
    left = tokens
    while left > 0:
        filled = [size for size in sizes if size * _FILL_FROM <= left <= size]
        fitting = [size for size in sizes if size <= left]
        # The smallest that takes all that is left, else the largest that is full.
        size = filled[-1] if filled else next(iter(fitting), sizes[-1])
        chunks.append(size)
        left -= size
    return chunks


class Decoder:
    """Runs a model over one static cache.

    Args:
        model: A causal language model of transformers, prepared.
        batch: Sequences.
        positions: Length of the cache.
        padded: Sequences may begin with padding, which a mask hides.
        kv_cache: How keys and values are kept, see `autoquant.runtime.generate.kv_codes`.
        divisions: Ways to compile steps, one of which has to work. None: those that suit the model,
            or else steps run without being compiled.

    Attributes:
        note: How steps are compiled and why, if it is not the usual way.
        choice: The tokens that `choose` chose.

    Raises:
        TypeError: The model keeps something else than keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        positions: int,
        *,
        padded: bool,
        kv_cache: KvCache | None = None,
        divisions: Sequence[Division] | None = None,
    ) -> None:
        self._asked, self._kind, self._unpacks = divisions, kv_cache, False
        self.batch, self.positions, self.padded = batch, positions, padded
        self.note = ""
        self._model = model
        self._device = next(model.parameters()).device
        self._backend = backend(self._device)
        # Tensors that are made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._state = StepState(batch, positions, self._device, padded=padded)
            self.choice = Choice(batch, positions, self._device)
            self._cache = static_cache(model, self._state, kv_cache)
            self._run_eagerly(self._ids(1))  # makes the cache's tensors
        self._steps: dict[int, Step] = {}
        self._not_replayed: dict[int, Step] = {}
        self._choosing: OrderedDict[Rule, Callable[[], torch.Tensor]] = OrderedDict()
        self._parts: nn.Module | None = None
        self._pool = self._backend.graph_pool()

    def start(self, mask: torch.Tensor | None) -> None:
        """Forget all tokens.

        Args:
            mask: `[batch, tokens]`, 0 for the prompt's padding; only for a padded decoder.
        """
        self._state.start(mask)

    def prompt(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Take a prompt in, chunk by chunk.

        Args:
            ids: `[batch, tokens]`; so `positions`.

        Returns:
            Logits `[batch, vocabulary]` after its last token, valid until the next step.
        """
        start, logits = 0, torch.empty(0)
        for size in chunks_of(ids.shape[1], self.batch):
            end = min(start + size, ids.shape[1])
            self._state.place(_filled(positions[:, start:end], size), kept=end - start - 1)
            logits = self._run(_filled(ids[:, start:end], size))
            self._state.take_back(start + size - end)
            start = end
        self._state.place(positions[:, -1:] + 1, kept=0)
        return logits

    def chunk(self, ids: torch.Tensor, positions: torch.Tensor, way: Way) -> torch.Tensor:
        """Take a prompt in as one chunk, of any length; as `prompt`."""
        self._state.place(positions, kept=ids.shape[1] - 1)
        logits = self._run(ids, way)
        self._state.place(positions[:, -1:] + 1, kept=0)
        return logits

    def all_logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Take a prompt in as `chunk`, compiled in parts; return logits of all its tokens."""
        self._state.place(positions, kept=0)
        logits = as_if_compiled()(self._step_of(self._in_parts(), keep_all=True))(ids)
        self._state.place(positions[:, -1:] + 1, kept=0)
        return logits

    def token(self, ids: torch.Tensor, way: Way = "replayed") -> torch.Tensor:
        """Take one token of each sequence in, `[batch, 1]`; as `prompt`."""
        return self._run(ids, way)

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens, whose position ids are 0, 1, ..."""
        self._state.rewind(tokens)

    def choose(self, rule: Rule) -> torch.Tensor:
        """Take the tokens of `choice` in, and replace them by the next ones, which are returned."""
        if rule not in self._choosing:
            self._choosing[rule] = self._made_choosing(rule)
            if len(self._choosing) > _MOST_RULES:
                self._choosing.popitem(last=False)
        return self._choosing[rule]()

    def filled_cache(self, tokens: int) -> Any:
        """Return keys and values of the first `tokens` positions as a cache of transformers."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        for number, layer in enumerate(self._cache.layers):
            cache.update(*layer.filled(tokens), number)
        return cache

    def _run(self, ids: torch.Tensor, way: Way = "replayed") -> torch.Tensor:
        size = ids.shape[1]
        if way == "eager":
            return self._run_eagerly(ids)[:, -1]
        step = self._step(size)
        return (step if way == "replayed" else self._not_replayed.get(size, step))(ids)[:, -1]

    def _step(self, size: int) -> Step:
        if size not in self._steps:
            self._steps[size] = self._make(size)
        return self._steps[size]

    def _made_choosing(self, rule: Rule) -> Callable[[], torch.Tensor]:
        """Return a step of one token with the choice behind it, replayed as one."""
        replayed = self._step(1)  # also compiles it, and compares it with the eager one
        step = self._not_replayed.get(1, replayed)
        choice = self.choice

        def choosing() -> torch.Tensor:
            return choice.take(rule, step(choice.tokens)[:, -1])

        def changed() -> list[torch.Tensor]:
            return [*self._state.tensors(), *choice.tensors()]

        if step is replayed:
            return choosing
        return self._backend.graphed(choosing, changed, self._pool)

    def _run_eagerly(self, ids: torch.Tensor) -> torch.Tensor:
        return self._step_of(self._model)(ids)

    def _ids(self, size: int) -> torch.Tensor:
        """Return token ids that can always be run."""
        return torch.arange(size, device=self._device).expand(self.batch, size) % 7

    def _step_of(self, module: nn.Module, *, keep_all: bool = False) -> Step:
        keeps = bool(self._model._supports_logits_to_keep())  # type: ignore[operator]
        own_mask = takes_made_mask(self._model)
        reads_codes = self._reads_codes(module)
        state = self._state

        def step(ids: torch.Tensor) -> torch.Tensor:
            state.reads_codes = reads_codes
            places = state.begin(ids.shape[1])
            output = module(
                input_ids=ids,
                position_ids=places.positions,
                attention_mask=state.mask(places) if own_mask else state.padding,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": 0 if keep_all else state.kept} if keeps else {}),
            )
            logits: torch.Tensor = output.logits
            state.end(places)
            return logits if keeps or keep_all else logits.index_select(1, state.kept)

        return step

    def _reads_codes(self, module: nn.Module) -> bool:
        """Check whether a module's attention reads the codes that the cache keeps."""
        if self._kind is None or not attention.is_used(module):
            return False
        layers = self._cache.layers
        return all(attention.takes_codes(each.dtype, each.keys, each.values) for each in layers)

    def _make(self, size: int) -> Step:
        """Return the step for chunks of `size` tokens, by the first way of compiling that works."""
        reason = ""
        for division in self._divisions():
            try:
                compiled = self._compiled(division)
                step = self._backend.graphed(compiled, self._state.tensors, self._pool)
                self._try(step, size)
            except Exception as error:
                if self._asked is not None:
                    raise
                reason = (
                    reason or f"compiling in {division} failed: {first_line(error, with_type=True)}"
                )
                continue
            self.note = reason and f"steps are compiled in another way, since {reason}"
            if self._unpacks:
                self.note = "; ".join(filter(None, (self.note, _UNPACKED)))
            self._not_replayed[size] = compiled
            return step
        reason = reason or f"torch.compile does not work here: {self._backend.compile_failure()}"
        self.note = f"steps run without being compiled, since {reason}"
        return self._step_of(self._model)

    def _divisions(self) -> tuple[Division, ...]:
        """Return the ways to compile steps, in the order in which to try them."""
        if self._asked is not None:
            return tuple(self._asked)
        if self._backend.compile_failure() is not None:
            return ()
        blocks = any(True for _ in repeated_blocks(self._model))
        return ("parts", "regions", "whole") if blocks else ("whole",)

    def _compiled(self, division: Division) -> Step:
        use_kernel_caches()
        in_parts = division == "parts"
        module = self._in_parts() if in_parts else self._ready(regions=division == "regions")
        self._unpacks = self._kind is not None and not self._reads_codes(module)
        step = self._step_of(module)
        return as_if_compiled()(step) if in_parts else compile_forward(step)

    def _in_parts(self) -> nn.Module:
        if self._parts is None:
            self._parts = compile_parts(self._ready(regions=False))
        return self._parts

    def _ready(self, *, regions: bool) -> nn.Module:
        ready = ready_to_compile(self._model, regions=regions)
        if attention.has_kernels(self._device.type):
            attention.use_token_attention(ready)
        return ready

    def _try(self, step: Step, size: int) -> None:
        """Run a step, which compiles it, and compare it with the same step run eagerly.

        What is in the cache stays: keys and values are written behind it, and overwritten later.

        Raises:
            ValueError: They differ by more than rounding explains, see `runtime.agreement`.
        """
        ids = self._ids(size)

        def run_eagerly() -> torch.Tensor:
            with self._state.set_aside(size):
                return self._run_eagerly(ids)

        with self._state.set_aside(size), kernels_kept(str(self._device)):
            got = step(ids).float()
        error = unexplained_error(got, run_eagerly(), run_eagerly)
        if error is not None:
            raise ValueError(f"it is off by {error:.2g} (relative) from the same step run eagerly")


def _filled(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return `[batch, tokens]` made `size` tokens long by repeating the last one."""
    missing = size - tensor.shape[1]
    if missing <= 0:
        return tensor
    repeated = tensor[:, -1:].expand(-1, missing)
    return torch.cat((tensor, repeated), dim=1)
