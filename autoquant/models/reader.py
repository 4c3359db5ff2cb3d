"""Make the inputs of a model of transformers out of texts, pictures and sounds.

The tokenizer, the image processor and the feature extractor in the model's folder do it, with their
own settings. Pictures and sounds that nobody gave are made up, the same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.models.loaded import main_dtype
from autoquant.models.quiet import quiet

Reads = Literal["texts", "pictures", "sounds"]
Batch: TypeAlias = dict[str, torch.Tensor]
"""Arguments of one forward pass by name, each with as many rows."""

_ARGUMENTS: Mapping[str, Reads] = {
    "input_ids": "texts",
    "pixel_values": "pictures",
    "input_values": "sounds",
    "input_features": "sounds",
}
_TEXT = (
    "A river runs from the hills to the sea. In spring it carries melted snow, and in autumn"
    " leaves. Farmers ask how high it will rise; engineers measure 3.5 metres at the old bridge and"
    ' write: "The gauge was read at 7 a.m., 12 p.m. and 6 p.m." Nobody knows why the fish left. '
)
_PICTURE_PIXELS = 256
_COARSEST, _LEVELS = 4, 6
_SOUND_SECONDS = 3.0
_UNLIMITED = 10**9  # tokenizers without a limit name a far larger one


class Reader:
    """Makes inputs for one model.

    Args:
        folder: Holds the settings of its processors.
        tokenizer: None for a model that reads no text.

    Attributes:
        reads: What one input of the model has.
        max_tokens: The longest text that the model takes, with what the tokenizer puts around it;
            None if there is no limit.

    Raises:
        ModelError: The model reads something else, or its tokenizer or processor is missing.
    """

    def __init__(self, module: nn.Module, folder: Path, tokenizer: Any | None) -> None:
        self.tokenizer, self._folder = tokenizer, folder
        self._config: Any = module.config
        self._dtype = main_dtype(module)
        self.reads = _reads(module)
        name = type(module).__name__
        if not self.reads:
            raise ModelError(
                f"{name} reads neither texts nor pictures nor sounds by themselves: give what it"
                " reads with --sample-inputs package.module:callable"
            )
        if "texts" in self.reads and tokenizer is None:
            raise ModelError(
                f"{folder} has no tokenizer.json, and {name} reads texts: put the model's tokenizer"
                " there, or give one with --tokenizer FOLDER"
            )
        self._pictures = self._processor("AutoImageProcessor") if self._has("pictures") else None
        self._sounds = self._processor("AutoFeatureExtractor") if self._has("sounds") else None
        self.max_tokens = _max_tokens(module, tokenizer) if self._has("texts") else None

    def _has(self, kind: Reads) -> bool:
        return kind in self.reads

    def _processor(self, kind: str) -> Any:
        import transformers

        try:
            with quiet():
                return getattr(transformers, kind).from_pretrained(
                    self._folder, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            if kind == "AutoImageProcessor":
                return None  # the configuration says how large pictures are
            raise ModelError(
                f"{self._folder} has no preprocessor_config.json that can be read"
                f" ({first_line(error)}), and its model reads sounds: put its own there"
            ) from error

    @property
    def words(self) -> str:
        """What made-up inputs are made from, e.g. `pictures of noise and shapes`."""
        settings = "by its own processor"
        if self._has("pictures") and self._pictures is None:
            settings = "scaled to -1 to 1, since its folder has no preprocessor_config.json"
        parts = {
            "texts": "texts",
            "pictures": f"pictures of noise and shapes, {settings}",
            "sounds": "sounds of tones and noise, by its own feature extractor",
        }
        return " with ".join(parts[kind] for kind in self.reads)

    def frame(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and behind every text."""
        words: Any = self.tokenizer
        bare = list(words("a", add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(words("a", verbose=False)["input_ids"])
        for start in range(len(whole)):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def ids(self, text: str, most: int) -> list[int]:
        """Return the ids of a text of at most so many, with what the tokenizer puts around."""
        before, behind = self.frame()
        words: Any = self.tokenizer
        own = list(words(text, add_special_tokens=False, verbose=False)["input_ids"])
        return [*before, *own[: max(1, most - len(before) - len(behind))], *behind]

    def some_ids(self, tokens: int) -> list[int]:
        """Return the ids of a made-up text of that many tokens."""
        words: Any = self.tokenizer
        once = len(words(_TEXT, add_special_tokens=False, verbose=False)["input_ids"])
        return self.ids(_TEXT * (1 + tokens // max(1, once)), tokens)

    def batch(
        self,
        *,
        ids: Sequence[Sequence[int]] = (),
        pictures: Sequence[Any] = (),
        sounds: Sequence[Any] = (),
    ) -> Batch:
        """Return the arguments of a forward pass, on the CPU.

        Args:
            ids: Of texts of one length.
            pictures: Of PIL, or arrays `[height, width]` or `[height, width, channels]`.
            sounds: Waves `[samples]`, at the rate of the feature extractor.
        """
        made: Batch = {}
        if ids:
            rows = torch.tensor([list(row) for row in ids], dtype=torch.long)
            made |= {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        if pictures:
            made |= self._of_pictures(pictures)
        if sounds:
            extractor: Any = self._sounds
            read = extractor(
                [np.asarray(sound, dtype=np.float32) for sound in sounds],
                sampling_rate=extractor.sampling_rate,
                return_tensors="pt",
            )
            made |= {name: value for name, value in read.items() if name in _ARGUMENTS}
        return {
            name: value.to(self._dtype) if value.is_floating_point() else value
            for name, value in made.items()
        }

    def made_up(self, number: int, rows: int, tokens: int) -> Batch:
        """Return made-up inputs: of other pictures and sounds for another number."""
        numbers = [number * rows + row for row in range(rows)]
        return self.batch(
            ids=[self.some_ids(tokens)] * rows if self._has("texts") else (),
            pictures=[picture(each) for each in numbers] if self._has("pictures") else (),
            sounds=[self.sound(each) for each in numbers] if self._has("sounds") else (),
        )

    def sound(self, number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a made-up sound."""
        extractor: Any = self._sounds
        return made_up_sound(number, int(extractor.sampling_rate))

    def _of_pictures(self, pictures: Sequence[Any]) -> Batch:
        channels = int(getattr(self._config, "num_channels", 3) or 3)
        images = [as_image(each, "L" if channels == 1 else "RGB") for each in pictures]
        if self._pictures is not None:
            with quiet():
                options = {"input_data_format": "channels_last"} if channels == 1 else {}
                arrays = [np.asarray(each).reshape(*each.size[::-1], -1) for each in images]
                read = self._pictures(
                    images=arrays if channels == 1 else images, return_tensors="pt", **options
                )
            return {"pixel_values": read["pixel_values"]}
        size = _image_size(self._config)
        arrays = [np.asarray(each.resize((size, size))) for each in images]
        stacked = torch.tensor(np.stack(arrays), dtype=torch.float32) / 127.5 - 1
        stacked = stacked.unsqueeze(1) if channels == 1 else stacked.permute(0, 3, 1, 2)
        return {"pixel_values": stacked.contiguous()}


def _reads(module: nn.Module) -> tuple[Reads, ...]:
    arguments = signature(module.forward).parameters
    found = [kind for name, kind in _ARGUMENTS.items() if name in arguments]
    if getattr(module, "main_input_name", "") in ("input_features", "input_values"):
        found = [kind for kind in found if kind != "texts"]  # Whisper takes no ids in its encoder
    return tuple(dict.fromkeys(found))


def _image_size(config: Any) -> int:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None)
    if isinstance(size, (list, tuple)) and size:
        size = size[0]
    return int(size) if isinstance(size, int) else 224


def _max_tokens(module: nn.Module, tokenizer: Any) -> int | None:
    """Return the longest text that a model takes, or None if nothing limits it."""
    config: Any = module.config
    text = config.get_text_config()
    limits = [getattr(tokenizer, "model_max_length", None)]
    if not getattr(config, "is_encoder_decoder", False) or "T5" not in type(config).__name__:
        limits += [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # RoBERTa counts positions from behind its padding's number.
            offset = 0 if part.padding_idx is None else part.padding_idx + 1
            limits.append(part.num_embeddings - offset)
    found = [each for each in limits if isinstance(each, int) and 0 < each < _UNLIMITED]
    return min(found, default=None)


def as_image(value: Any, mode: str) -> Any:
    """Return a picture of PIL. Integers are 0 to 255, and other numbers 0 to 1, or 0 to 255, too.

    Args:
        value: A picture of PIL, or numbers `[height, width]` or `[height, width, channels]`.
    """
    from PIL import Image

    if not isinstance(value, Image.Image):
        array = np.asarray(value)
        if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"a picture has two or three dimensions of numbers, not {array.shape}")
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
            array = array.transpose(1, 2, 0)
        array = array.squeeze(-1) if array.shape[-1] == 1 and array.ndim == 3 else array
        if array.dtype != np.uint8:
            share = np.issubdtype(array.dtype, np.floating) and array.max(initial=0.0) <= 1.0
            array = np.clip(array * (255.0 if share else 1.0), 0, 255).round().astype(np.uint8)
        value = Image.fromarray(array)
    return value.convert(mode)


def picture(number: int) -> Any:
    """Return a made-up picture: noise that is rough and fine, with shapes on it."""
    from PIL import Image, ImageDraw

    draw = np.random.default_rng(number)
    size = (_PICTURE_PIXELS, _PICTURE_PIXELS)
    total = np.zeros((*size, 3))
    for level in range(_LEVELS):
        cells = _COARSEST * 2**level
        coarse = draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        total += (np.asarray(fine, dtype=np.float64) - 127.5) / (1 + level)
    image = Image.fromarray(np.clip(127.5 + total / 2, 0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(int(draw.integers(1, 5))):
        (left, top), (width, height) = draw.integers(0, 200, 2), draw.integers(20, 160, 2)
        color = tuple(int(value) for value in draw.integers(0, 256, 3))
        shape = canvas.ellipse if draw.random() < 0.5 else canvas.rectangle
        shape([left, top, left + width, top + height], fill=color)
    return image


def made_up_sound(number: int, rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a made-up sound `[samples]`: syllables of tones with their harmonics, and noise."""
    draw = np.random.default_rng(number)
    time_s = np.arange(int(_SOUND_SECONDS * rate)) / rate
    wave = 0.01 * draw.standard_normal(len(time_s))
    start = 0.1
    while start < _SOUND_SECONDS - 0.3:
        length, pitch = draw.uniform(0.1, 0.4), draw.uniform(90, 300)
        inside = (time_s >= start) & (time_s < start + length)
        envelope = np.where(inside, np.sin(np.clip((time_s - start) / length, 0, 1) * math.pi), 0)
        for harmonic in range(1, 12):
            strength = draw.uniform(0, 1) / harmonic
            wave += 0.2 * strength * envelope * np.sin(2 * math.pi * pitch * harmonic * time_s)
        start += length + draw.uniform(0, 0.3)
    made: np.ndarray[Any, np.dtype[np.float32]] = wave.astype(np.float32)
    return made


def on(batch: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return inputs with their tensors on a device."""
    placed = dict(batch)
    for name, value in batch.items():
        with suppress(AttributeError):
            placed[name] = value.to(device)
    return placed
