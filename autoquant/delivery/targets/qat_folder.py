"""Write which layers to round while a model is trained on, and to what.

The only file is `qat.json`, which `autoquant.prepare_qat` reads (see `autoquant.delivery.qat`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from autoquant.delivery.qat import FILE, FORMAT_VERSION, prepare_qat
from autoquant.delivery.targets.base import Contents, ExportedLayer, Writer
from autoquant.engines.targets import QAT
from autoquant.engines.values import A8_TOKEN, A16
from autoquant.errors import PlanError
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.trust import Trust


class QatWriter(Writer):
    """Writes descriptions for quantization-aware training with torchao."""

    target = QAT
    reader = ("torchao",)
    shows_weights = False
    takes_original = True
    written = "The file describes layers and holds no numbers of theirs."
    closing = (
        "Next: train what autoquant.prepare_qat returns, call autoquant.finish_qat and save it;"
        " then autoquant apply --retrained rounds the trained weights as the plan says."
    )

    def check(self, loaded: LoadedModel) -> None:
        if loaded.stream is not None:
            raise PlanError("the unquantized model does not fit here, and so cannot be trained")

    def write(self, contents: Contents, folder: Path) -> None:
        layers = {layer.name: described(layer) for layer in contents.layers.values()}
        fields = {"format_version": FORMAT_VERSION, "layers": layers}
        (folder / FILE).write_text(json.dumps(fields, indent=1), encoding="utf-8")

    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        assert contents.original is not None  # a streamed model is refused
        return prepare_qat(shallow_copy(contents.original), folder).eval()

    def notes(self, contents: Contents) -> tuple[str, ...]:
        named = sorted({str(each.values) for each in contents.layers.values()})
        rounded = [name for name in named if name.count("-") > 1]
        if not rounded:
            return ()
        return (
            f"training rounds to nearest, by torchao's own scales: {', '.join(rounded)} are found"
            " when the plan is applied again",
        )


def described(layer: ExportedLayer) -> dict[str, Any]:
    """Return what `qat.json` says of a layer."""
    family, group = layer.values.family, layer.values.group
    weight: dict[str, Any] = {"type": "float8", "per": family.removeprefix("float8-")}
    if family.startswith("int"):
        bits = int(family[3])
        weight = {"type": f"int{bits}", "per": "row" if group is None else group}
        weight["symmetric"] = family != "int4"
    activation: dict[str, Any] | None = None
    if layer.scheme.activation == A8_TOKEN:
        activation = {"type": "int8", "per": "token", "symmetric": False}
    elif layer.scheme.activation != A16:
        activation = {"type": "float8", "per": layer.scheme.activation.rpartition("-")[2]}
    return {"weight": weight, "activation": activation}


WRITER = QatWriter()
