"""A folder as `autoquant apply` writes it, of a tiny model, without a search."""

from __future__ import annotations

from autoquant.delivery import checkpoint
from autoquant.delivery.applier import apply
from autoquant.models import load_model
from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, RouteStep

from .tiny import save_llama

EIGHT_BITS = (
    "int8-row/plain",
    (RouteStep(upper_m=4, kernel="dequantize-matmul"), RouteStep(upper_m=None, kernel="int-mm")),
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w0 {% endif %}"
FOUR_BITS = ("int4-g32/cpu-packed", (RouteStep(upper_m=None, kernel="int4pack-mm"),))


def mixed_plan(module, eight=EIGHT_BITS, four=FOUR_BITS):
    """Eight bits, q, k and v as one, a head that leaves its embedding, and four bits in `down_proj`."""
    layers = []
    for name, part in module.named_modules():
        if type(part).__name__ == "Linear":
            fmt, route = four if name.endswith("down_proj") else eight
            parent, _, leaf = name.rpartition(".")
            layers.append(
                LayerChoice(
                    name=name,
                    shape=LinearShape(
                        n=part.out_features, k=part.in_features, bias=False, dtype="bfloat16"
                    ),
                    format=fmt,
                    route=route,
                    numerics="",
                    latency_us={},
                    memory_bytes=0,
                    loss=0.0,
                    parameters=(f"{name}.weight",),
                    joined=tuple(f"{parent}.{each}_proj" for each in "qkv")
                    if leaf[0] in "qkv"
                    else (),
                )
            )
    return Plan(
        plan_id="abcd",
        study_id="study",
        label="mixed",
        kind="front",
        model_hash="hash",
        dtype="bfloat16",
        layers=tuple(layers),
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


def save_applied(original, folder, device="cpu", **formats):
    """Quantize the model of a folder into another one."""
    loaded = load_model(original, device=device)
    plan = mixed_plan(loaded.module, **formats)
    apply(plan, loaded.module)
    folder.mkdir()
    checkpoint.write(loaded, plan, folder)
    return folder


def save_both(place):
    """(folder of a tiny model with a chat template, folder of the same model quantized)."""
    original = save_llama(place / "original")
    (original / "chat_template.jinja").write_text(TEMPLATE)
    return original, save_applied(original, place / "quantized")
