"""Triton kernels of weight-only products with one row, which were tried and are not faster than the
libraries'.

Shape suffixes: n out features, k in features, c chunks of 32 weights along k, g groups along k.
"""

# Triton reads these functions' annotations, so they carry no others.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

_UNPACK_8 = tl.constexpr("""
{
.reg .b32 low, high, shifted;
.reg .b8 l0, l1, l2, l3, h0, h1, h2, h3;
and.b32 low, $8, 0x0F0F0F0F;
shr.u32 shifted, $8, 4;
and.b32 high, shifted, 0x0F0F0F0F;
mov.b32 {l0, l1, l2, l3}, low;
mov.b32 {h0, h1, h2, h3}, high;
cvt.rn.f32.u8 $0, l0;
cvt.rn.f32.u8 $1, h0;
cvt.rn.f32.u8 $2, l1;
cvt.rn.f32.u8 $3, h1;
cvt.rn.f32.u8 $4, l2;
cvt.rn.f32.u8 $5, h2;
cvt.rn.f32.u8 $6, l3;
cvt.rn.f32.u8 $7, h3;
}
""")


@triton.jit
def _unpack(q, ASM: tl.constexpr):
    """The eight values 0 to 15 of each 32-bit word, lowest bits first, as float32."""
    if ASM:
        return tl.inline_asm_elementwise(
            _UNPACK_8,
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [q],
            dtype=(
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
            ),
            is_pure=True,
            pack=1,
        )
    return (
        (q & 15).to(tl.float32),
        ((q >> 4) & 15).to(tl.float32),
        ((q >> 8) & 15).to(tl.float32),
        ((q >> 12) & 15).to(tl.float32),
        ((q >> 16) & 15).to(tl.float32),
        ((q >> 20) & 15).to(tl.float32),
        ((q >> 24) & 15).to(tl.float32),
        ((q >> 28) & 15).to(tl.float32),
    )


@triton.jit
def gemv_w4(
    x_ptr,
    w_ptr,
    scale_zero_ptr,
    bias_ptr,
    y_ptr,
    n,
    k,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    """y_n = x_k . ((q_nk - 8) * scale_ng + zero_ng) (+ bias_n), weights in chunks of 32 held in
    four 32-bit words.

    Weight 4 * s + j of a chunk is nibble s of word j. A chunk lies in one group, so scale and zero
    point are applied to sums: scale * (sum(q * x) - 8 * sum(x)) + zero * sum(x). Roofline: (1/2 +
    4/GROUP) * n * k bytes over the memory's bandwidth.
    """
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows_n < n
    word = tl.arange(0, 4)
    chunks = k // 32
    w_rows = w_ptr + rows_n.to(tl.int64)[:, None, None] * (k // 8)
    s_rows = scale_zero_ptr + rows_n.to(tl.int64)[:, None] * (k // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, chunks, BLOCK_C):
        here_c = start + tl.arange(0, BLOCK_C)
        inside_c = here_c < chunks
        w_at = w_rows + here_c[None, :, None] * 4 + word[None, None, :]
        s_at = s_rows + (here_c // (GROUP // 32))[None, :]
        if EVEN_N and EVEN_K:
            q = tl.load(w_at, eviction_policy="evict_first")
            scale_zero = tl.load(s_at)
        else:
            inside = inside_n[:, None] & inside_c[None, :]
            q = tl.load(w_at, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
            scale_zero = tl.load(s_at, mask=inside, other=0)
        q0, q1, q2, q3, q4, q5, q6, q7 = _unpack(q, ASM)
        x_at = x_ptr + here_c[:, None] * 32 + word[None, :]
        mask_x = inside_c[:, None]
        x0 = tl.load(x_at, mask=mask_x, other=0.0).to(tl.float32)
        x1 = tl.load(x_at + 4, mask=mask_x, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + 8, mask=mask_x, other=0.0).to(tl.float32)
        x3 = tl.load(x_at + 12, mask=mask_x, other=0.0).to(tl.float32)
        x4 = tl.load(x_at + 16, mask=mask_x, other=0.0).to(tl.float32)
        x5 = tl.load(x_at + 20, mask=mask_x, other=0.0).to(tl.float32)
        x6 = tl.load(x_at + 24, mask=mask_x, other=0.0).to(tl.float32)
        x7 = tl.load(x_at + 28, mask=mask_x, other=0.0).to(tl.float32)
        dot = q0 * x0[None, :, :] + q1 * x1[None, :, :] + q2 * x2[None, :, :] + q3 * x3[None, :, :]
        dot += q4 * x4[None, :, :] + q5 * x5[None, :, :] + q6 * x6[None, :, :] + q7 * x7[None, :, :]
        sum_x = tl.sum(x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7, axis=1)[None, :]
        scale = (scale_zero << 16).to(tl.float32, bitcast=True)
        zero = (scale_zero & -65536).to(tl.float32, bitcast=True)
        acc += scale * (tl.sum(dot, axis=2) - 8.0 * sum_x) + zero * sum_x
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows_n, y.to(y_ptr.dtype.element_ty), mask=inside_n)


@triton.jit
def gemv_w8(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_n = (x_k . w_nk) * scale_n (+ bias_n), w of 8 bits.

    Roofline: n * k bytes over the memory's bandwidth.
    """
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows_n < n
    w_rows = w_ptr + rows_n.to(tl.int64)[:, None] * k
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        cols_k = start + tl.arange(0, BLOCK_K)
        if EVEN_N and EVEN_K:
            w = tl.load(w_rows + cols_k[None, :], eviction_policy="evict_first")
        else:
            inside = inside_n[:, None] & (cols_k < k)[None, :]
            w = tl.load(
                w_rows + cols_k[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
            )
        x = tl.load(x_ptr + cols_k, mask=cols_k < k, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if PER_ROW:
        y *= tl.load(scale_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)
    else:
        y *= tl.load(scale_ptr).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows_n, y.to(y_ptr.dtype.element_ty), mask=inside_n)
