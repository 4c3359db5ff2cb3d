"""Targets of an export: the numbers that each form of files holds exactly, as tables.

To add a target, write a table beside these and list it in `TARGETS`. A family of numbers that a
target holds has a row in `holds`. One that it could nearly hold has a row in `instead`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoquant.engines.values import A8_TOKEN, A16, UNQUANTIZED, Values
from autoquant.records import LinearShape

PLAIN = "plain"
"""Scheme of a layer that is left unquantized."""
_GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a target makes of one layer.

    Attributes:
        name: The target's own name of the storage, or `PLAIN`.
        activation: How the engine is told to round the activation. It may be less than the plan
            does: then the layer is computed more exactly than its loss was scored. Where an engine
            always rounds, it may be more.
    """

    name: str
    activation: str = A16


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a target cannot hold a layer exactly.

    Attributes:
        reason: One line without the layer's name.
        nearest: Values that the target holds for this shape, or "".
    """

    reason: str
    nearest: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; nearest: {self.nearest}" if self.nearest else self.reason


@dataclass(frozen=True, slots=True)
class Stored:
    """What a target keeps of a weight of one family.

    Attributes:
        bits: Of each weight, with its part of what a block of the target's own has beside it.
        group_bits: What it keeps for each group of the plan beside that.
    """

    bits: float
    group_bits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One form of files.

    Attributes:
        name: As `--to` takes it.
        holds: By family, the schemes by how the plan rounds the activation. Any other rounding
            gets the scheme of `A16`, which every family has.
        instead: By family that is not held: why, and the values to search instead. `{group}` and
            `{rounding}` are replaced by those of the layer.
        multiples: By scheme, what k must be a multiple of. A group always divides k.
        only_nearest: Families that are held exactly only if rounded to nearest, and why.
        converts: Its files are of use for a plan that quantizes nothing, too: what reads them does
            not read the model itself.
        stores: By family, what it keeps of a weight, where that is not what the plan keeps.
        block: Weights that share a scale in its files, whatever the plan has, or None. Larger
            groups repeat it, so they win nothing there.
        ties: It may hold one tensor for an embedding and a quantized head that is tied to it.
        tries: Values that a search for it tries beside those of every search: the most exact ones
            of their size in its files.
    """

    name: str
    holds: Mapping[str, Mapping[str, Scheme]]
    instead: Mapping[str, tuple[str, str]]
    multiples: Mapping[str, int] = field(default_factory=dict)
    only_nearest: Mapping[str, str] = field(default_factory=dict)
    converts: bool = False
    stores: Mapping[str, Stored] = field(default_factory=dict)
    block: int | None = None
    ties: bool = False
    tries: tuple[str, ...] = ()

    def stored_bytes(self, values: str, shape: LinearShape) -> int | None:
        """Return the bytes that its files have for a weight, or None for those of the plan.

        Args:
            values: First part of the format's id. The target holds them.
        """
        parsed = Values.parse(values)
        stored = self.stores.get(parsed.family)
        if stored is None:
            return None
        groups = 0 if parsed.group is None else -(-shape.k // parsed.group)
        return int(shape.n * (shape.k * stored.bits + groups * stored.group_bits)) // 8

    def repeats_scales(self, values: str) -> bool:
        """Check whether its files repeat the scales of these values, which so win nothing there."""
        group = Values.parse(values).group
        return self.block is not None and group is not None and group > self.block

    def scheme(self, values: str, numerics: str, shape: LinearShape) -> Scheme | Refusal:
        """Return how the target holds a layer, or why it cannot.

        Args:
            values: First part of the format's id, e.g. `int4s-g64-gptq`.
            numerics: How the layer rounds the activation (see `rounded_activation`).
        """
        parsed = Values.parse(values)
        if parsed.family in UNQUANTIZED:
            return Scheme(PLAIN)
        schemes = self.holds.get(parsed.family)
        if schemes is None:
            return self._not_held(parsed, shape)
        if parsed.rounding and parsed.family in self.only_nearest:
            return Refusal(self.only_nearest[parsed.family], f"{parsed.family}-g{parsed.group}")
        found = schemes.get(numerics, schemes[A16])
        return self._unfit(parsed, found, shape) or found

    def _not_held(self, values: Values, shape: LinearShape) -> Refusal:
        if values.family not in self.instead:
            return Refusal(f"{values.family} is not known to {self.name}")
        reason, template = self.instead[values.family]
        rounding = f"-{values.rounding}" if values.rounding else ""
        nearest = template.format(group=values.group, rounding=rounding)
        if isinstance(refused := self.scheme(nearest, A16, shape), Refusal):
            nearest = refused.nearest
        return Refusal(reason, nearest)

    def _unfit(self, values: Values, scheme: Scheme, shape: LinearShape) -> Refusal | None:
        step = self.multiples.get(scheme.name, 1)
        if shape.k % step:
            return Refusal(f"k={shape.k} is not a multiple of {step}, the blocks of {scheme.name}")
        if values.group is None or shape.k % values.group == 0:
            return None
        reason = f"k={shape.k} is not a multiple of the group size {values.group}"
        fit = next((g for g in _GROUPS if g < values.group and shape.k % g == 0), None)
        smaller = Values(values.family, fit, values.rounding)
        return Refusal(reason, "int8-row" if fit is None else str(smaller))


_OTHER_BITS = {
    family: (f"of these targets only gguf holds {family}", "int8-row")
    for family in ("int5s", "int5", "int6s")
}
_REAL_ZEROS = "holds zero points that are integers, and those of {} are not"
_COMPRESSED = "pack-quantized"
_FLOAT8 = "float-quantized"
_INTX = "IntxUnpackedToInt8Tensor"

COMPRESSED_TENSORS = Target(
    name="compressed-tensors",
    holds={
        "int8-row": {
            A16: Scheme(_COMPRESSED),
            "a8-row": Scheme("int-quantized", "a8-row"),
        },
        "float8-row": {
            A16: Scheme(_FLOAT8),
            "a8-float8-row": Scheme(_FLOAT8, "a8-float8-row"),
        },
        # Engines merge the scales of tensors that they compute as one, which changes the numbers.
        # So the one scale is written for each row. Then the activation has one for each row, too.
        "float8-tensor": {
            A16: Scheme(_FLOAT8),
            "a8-float8-tensor": Scheme(_FLOAT8, "a8-float8-row"),
        },
        "int4s": {A16: Scheme(_COMPRESSED)},
        "int3": {A16: Scheme(_COMPRESSED)},
        "int2": {A16: Scheme(_COMPRESSED)},
        "mxfp8": {A16: Scheme("mxfp8-quantized"), "a-mxfp8": Scheme("mxfp8-quantized", "a-mxfp8")},
        "mxfp4": {
            A16: Scheme("mxfp4-pack-quantized"),
            "a-mxfp4": Scheme("mxfp4-pack-quantized", "a-mxfp4"),
        },
        # Rounded activations would need a scale that is measured beforehand.
        "nvfp4": {A16: Scheme("nvfp4-pack-quantized")},
    },
    instead={
        "int4": (
            f"compressed-tensors {_REAL_ZEROS.format('int4')}",
            "int4s-g{group}{rounding}",
        ),
        **_OTHER_BITS,
    },
)
"""A folder of safetensors, one group of layers for each scheme (vLLM, SGLang, transformers).

Source: the package compressed-tensors 0.20.1, `quantization/quant_args.py` and `compressors/`.
"""

GGUF = Target(
    name="gguf",
    holds={
        "int8-row": {A16: Scheme("Q8_0"), "a8-row": Scheme("Q8_0")},
        "int4s": {A16: Scheme("Q4_0"), "a8-row": Scheme("Q4_0")},
        "int3": {A16: Scheme("Q4_0")},
        "int2": {A16: Scheme("Q4_0")},
        "int4": {A16: Scheme("Q4_1"), "a8-row": Scheme("Q4_1")},
        "int5s": {A16: Scheme("Q5_0")},
        "int5": {A16: Scheme("Q5_1")},
        "int6s": {A16: Scheme("Q6_K")},
        "mxfp4": {A16: Scheme("MXFP4")},
        "nvfp4": {A16: Scheme("NVFP4")},
    },
    instead={
        "float8-row": ("GGUF has no float8", "int8-row"),
        "float8-tensor": ("GGUF has no float8", "int8-row"),
        "mxfp8": ("GGUF has no float8", "int8-row"),
    },
    multiples={
        "Q8_0": 32,
        "Q4_0": 32,
        "Q4_1": 32,
        "Q5_0": 32,
        "Q5_1": 32,
        "Q6_K": 256,
        "MXFP4": 32,
        "NVFP4": 64,
    },
    only_nearest={
        "int4": "Q4_1 keeps 16 bits of the offset, which moves zero points found by better rounding"
    },
    converts=True,
    stores={
        "int8-row": Stored(8.5),
        "int4s": Stored(4.5),
        "int3": Stored(4.5),
        "int2": Stored(4.5),
        "int4": Stored(5),
        "int5s": Stored(5.5),
        "int5": Stored(6),
        "int6s": Stored(6.5625),
        "mxfp4": Stored(4.25),
        "nvfp4": Stored(4.5),
    },
    block=32,
    ties=True,
    tries=("int4s-g32-gptq", "int5s-g32-gptq", "int5-g32-gptq", "int6s-g16"),
)
"""One file of blocks of 32 weights (llama.cpp, Ollama, LM Studio).

Source: `ggml/src/ggml-common.h` of llama.cpp and the package gguf 0.19.0. The engine rounds
activations to int8 in blocks of its own, whatever the plan does.
"""

TRANSFORMERS = Target(
    name="transformers",
    holds={
        "int8-row": {A16: Scheme("Int8Tensor"), "a8-row": Scheme("Int8Tensor", "a8-row")},
        "float8-row": {
            A16: Scheme("Float8Tensor"),
            "a8-float8-row": Scheme("Float8Tensor", "a8-float8-row"),
        },
        "float8-tensor": {
            A16: Scheme("Float8Tensor"),
            "a8-float8-tensor": Scheme("Float8Tensor", "a8-float8-tensor"),
        },
        "int4s": {A16: Scheme(_INTX)},
        "int3": {A16: Scheme(_INTX)},
        "int2": {A16: Scheme(_INTX)},
    },
    instead={
        "int4": (
            f"torchao's tensor for any device {_REAL_ZEROS.format('int4')}",
            "int4s-g{group}{rounding}",
        ),
        **_OTHER_BITS,
        "mxfp8": ("torchao's tensor of mxfp8 runs on Blackwell only", "float8-row"),
        "mxfp4": ("torchao's tensor of mxfp4 runs on Blackwell only", "int4s-g32"),
        "nvfp4": ("torchao's tensor of nvfp4 runs on Blackwell only", "int4s-g32"),
    },
    # A byte for each integer, whatever it needs, and a scale and a zero point for each group.
    stores={"int4s": Stored(8, 24), "int3": Stored(8, 24), "int2": Stored(8, 24)},
)
"""A folder of torchao's tensors that `from_pretrained` of transformers reads.

Source: `ALLOWED_TENSORS_SUBCLASSES` of torchao 0.18, and transformers 5.23, `quantizer_torchao.py`.
"""

_EIGHT, _FOUR = "8da8w", "8da4w"

EXECUTORCH = Target(
    name="executorch",
    holds={
        "int8-row": {A16: Scheme(_EIGHT, A8_TOKEN), "a8-row": Scheme(_EIGHT, "a8-row")},
        "int4s": {A16: Scheme(_FOUR, A8_TOKEN), "a8-row": Scheme(_FOUR, "a8-row")},
        "int3": {A16: Scheme(_FOUR, A8_TOKEN)},
        "int2": {A16: Scheme(_FOUR, A8_TOKEN)},
    },
    instead={
        "int4": (f"XNNPACK {_REAL_ZEROS.format('int4')}", "int4s-g{group}{rounding}"),
        **_OTHER_BITS,
        "float8-row": ("XNNPACK has no float8", "int8-row"),
        "float8-tensor": ("XNNPACK has no float8", "int8-row"),
        "mxfp8": ("XNNPACK has no float8", "int8-row"),
        "mxfp4": ("XNNPACK has no 4-bit floats", "int4s-g32"),
        "nvfp4": ("XNNPACK has no 4-bit floats", "int4s-g32"),
    },
    stores={"int3": Stored(4, 16), "int2": Stored(4, 16)},
)
"""One program that ExecuTorch runs through XNNPACK, on phones and other CPUs.

Every activation is rounded to int8, whatever the plan does: each token between its smallest and its
largest number, which is at least as fine as rows of `a8-row`.

Source: executorch 1.5.1, `backends/xnnpack/operators/node_visitor.py`.
"""

_INTEGERS, _FLOATS = "IntxFakeQuantizeConfig", "Float8FakeQuantizeConfig"

QAT = Target(
    name="qat",
    holds={
        "int8-row": {A16: Scheme(_INTEGERS), "a8-row": Scheme(_INTEGERS, A8_TOKEN)},
        "int4": {A16: Scheme(_INTEGERS), "a8-row": Scheme(_INTEGERS, A8_TOKEN)},
        "int4s": {A16: Scheme(_INTEGERS), "a8-row": Scheme(_INTEGERS, A8_TOKEN)},
        "int3": {A16: Scheme(_INTEGERS)},
        "int2": {A16: Scheme(_INTEGERS)},
        "float8-row": {A16: Scheme(_FLOATS), "a8-float8-row": Scheme(_FLOATS, "a8-float8-row")},
        "float8-tensor": {
            A16: Scheme(_FLOATS),
            "a8-float8-tensor": Scheme(_FLOATS, "a8-float8-tensor"),
        },
    },
    instead={
        **_OTHER_BITS,
        "mxfp8": ("torchao trains no mxfp8", "float8-row"),
        "mxfp4": ("torchao trains no mxfp4", "int4s-g32"),
        "nvfp4": ("torchao trains no nvfp4", "int4s-g32"),
    },
)
"""What torchao rounds weights to while a model is trained on. It holds no numbers.

Source: torchao 0.18, `quantization/qat/fake_quantize_config.py`.
"""

_ROWS = "FP8_PER_CHANNEL_PER_TOKEN"
_NO_INTEGERS = "vLLM reads no integers of ModelOpt"

MODELOPT = Target(
    name="modelopt",
    holds={
        "float8-row": {
            A16: Scheme(_ROWS, "a8-float8-row"),
            "a8-float8-row": Scheme(_ROWS, "a8-float8-row"),
        },
        "mxfp8": {A16: Scheme("MXFP8", "a-mxfp8"), "a-mxfp8": Scheme("MXFP8", "a-mxfp8")},
        # Rounded activations would need a scale that is measured beforehand.
        "nvfp4": {A16: Scheme("W4A16_NVFP4")},
    },
    instead={
        "float8-tensor": ("its FP8 needs a scale of activations, measured before", "float8-row"),
        "int8-row": (_NO_INTEGERS, "float8-row"),
        "int4": (_NO_INTEGERS, "nvfp4"),
        "int4s": (_NO_INTEGERS, "nvfp4"),
        "int3": (_NO_INTEGERS, "nvfp4"),
        "int5s": (_NO_INTEGERS, "nvfp4"),
        "int5": (_NO_INTEGERS, "nvfp4"),
        "int6s": (_NO_INTEGERS, "nvfp4"),
        "int2": (_NO_INTEGERS, "nvfp4"),
        "mxfp4": ("vLLM reads no mxfp4 of ModelOpt for linears", "nvfp4"),
    },
    multiples={"W4A16_NVFP4": 16, "MXFP8": 32},
)
"""A folder as NVIDIA ModelOpt writes it (vLLM). float8 and mxfp8 always round activations.

Source: vLLM 0.32, `model_executor/layers/quantization/modelopt.py`; nvidia-modelopt 0.47,
`torch/export/quant_utils.py`.
"""

TARGETS: Mapping[str, Target] = {
    each.name: each for each in (COMPRESSED_TENSORS, GGUF, TRANSFORMERS, EXECUTORCH, QAT, MODELOPT)
}
"""All targets by name."""
