"""The Triton kernel of norms of a few rows (`autoquant.profiler.norms`). Import it only where it is launched."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201 - Triton evaluates annotations, so only constants have one
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def normalize(
    x,
    other,
    weight,
    summed,
    out,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # WIDTH as a power of 2
    ADDS: tl.constexpr,
):
    """Normalize a row; if ADDS, of x + other, which goes to `summed`."""
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    row = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        row = (row.to(tl.float32) + tl.load(other + at, mask=inside, other=0.0).to(tl.float32)).to(row.dtype)
        tl.store(summed + at, row, mask=inside)
    exact = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / WIDTH + eps)
    normal = (exact * scale).to(row.dtype)
    tl.store(out + at, (factor.to(tl.float32) * normal.to(tl.float32)).to(row.dtype), mask=inside)
