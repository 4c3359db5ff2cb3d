"""The time that no kernel can beat on a device: plain arithmetic on its roofline."""

from __future__ import annotations

from autoquant.records import LinearShape, Roofline

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = ("bfloat16", "float16", "float32")
_EXACT_IN = {
    "float4": ("float4",),
    "float8": ("float8", *_FLOATS),
    "int8": ("int8", *_FLOATS),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "float32"),
    "float32": ("float32",),
}
"""By arithmetic, all that multiply its numbers exactly: a wider one may be faster."""


def floor_us(
    roofline: Roofline, shape: LinearShape, m: float, weight_bytes: float, arithmetic: str
) -> float:
    """Return the least microseconds of a linear of `m` rows: all bytes moved, or all products done.

    Args:
        weight_bytes: Bytes of the stored weight.
        arithmetic: What is multiplied: a key of `Roofline.flops_per_s`. If the device does not do
            it, the fastest wider one counts. If it does none of these, only memory limits.
    """
    activation_bytes = m * (shape.k + shape.n) * ELEMENT_BYTES[shape.dtype]
    memory_s = (weight_bytes + activation_bytes) / roofline.bandwidth_bytes_per_s
    rate = max((roofline.flops_per_s.get(name, 0.0) for name in _EXACT_IN[arithmetic]), default=0.0)
    products_s = 2 * m * shape.n * shape.k / rate if rate else 0.0
    return 1e6 * max(memory_s, products_s)
