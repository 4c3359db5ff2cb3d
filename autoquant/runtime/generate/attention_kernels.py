"""The Triton kernels of attention for one token, to be imported only to launch them.

The cache is read once, by many programs at a time: a program takes some blocks of positions for all
query heads that share a head of keys, and another kernel adds up what the programs of a head found.
Sums are float32, maxima are in powers of 2.

Codes of 8 bits are read as they are kept, and the scale of a position is a factor of its score,
and of its weight. Queries of 16 bits are multiplied with float8 in float16: a GPU turns float8 into
it in one instruction, and into bfloat16 in several, which take longer than reading. Queries and
weights are divided by the largest of a row before, so that float16 holds them.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, C901, PLR0915 - Triton evaluates annotations, so only constants have one; a kernel is one function
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "splits", "mask_batch"])  # type: ignore[untyped-decorator,unused-ignore]
def attend(
    q,
    k,
    v,
    k_scales,  # of codes: [batch, kv_heads, length]
    v_scales,
    mask,
    out,
    parts,
    sums,
    scale,  # of the scores, times log2(e)
    kv_heads,
    length,
    splits,  # programs of a head of keys
    q_batch,
    q_head,
    q_column,
    k_batch,
    k_head,
    k_row,
    k_column,
    v_batch,
    v_head,
    v_row,
    v_column,
    mask_batch,
    mask_head,
    mask_row,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a head of keys
    COLUMNS: tl.constexpr,  # WIDTH, V_WIDTH and GROUP as powers of 2
    V_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # positions read at a time
    ALONE: tl.constexpr,  # one program has all blocks of a head of keys
    MASKS: tl.constexpr,  # 0: none, 1: one for all heads, 2: one for each head
    CODES: tl.constexpr,  # keys and values are codes
    FLOAT8: tl.constexpr,  # those are float8
):
    """Attend to every `splits`-th block of a head of keys.

    Writes `out` if ALONE, else `parts` `[head, split, column]` and `sums` `[head, 2, split]`,
    maxima and sums. Blocks of a program lie apart, so that all programs have as much to do however
    far the cache is filled.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    rows, columns, v_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, V_COLUMNS)
    heads, real = kv_head * GROUP + rows, rows < GROUP
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    queries = tl.load(
        q + batch * q_batch + heads[:, None] * q_head + columns[None, :] * q_column,
        mask=real[:, None] & (columns[None, :] < WIDTH),
        other=0.0,
    )
    HALF: tl.constexpr = FLOAT8 and queries.dtype != tl.float32
    if HALF:
        exact = queries.to(tl.float32)
        largest = tl.max(tl.abs(exact), 1)
        largest = tl.where(largest == 0.0, 1.0, largest)
        queries = (exact / largest[:, None]).to(tl.float16)
        scales = scale * largest
    else:
        scales = tl.full([ROWS], 1.0, tl.float32) * scale
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_COLUMNS], tl.float32)
    for block in range(split, tl.cdiv(length, BLOCK), splits):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        at = at.to(tl.int64)
        if MASKS == 2:
            seen = tl.load(
                mask + batch * mask_batch + heads[:, None] * mask_head + at[None, :] * mask_row,
                mask=real[:, None] & inside[None, :],
                other=0,
            )
            seen = (seen != 0).to(tl.int32)
            read = tl.max(seen, 0)
        elif MASKS == 1:
            read = tl.load(mask + batch * mask_batch + at * mask_row, mask=inside, other=0)
            read = (read != 0).to(tl.int32)
            seen = tl.broadcast_to(read[None, :], [ROWS, BLOCK])
        else:
            read = inside.to(tl.int32)
            seen = tl.broadcast_to(read[None, :], [ROWS, BLOCK])
        if tl.max(read, 0) > 0:
            # Positions that no head sees are not read, so even an infinity there has no effect.
            read_k = (read > 0)[:, None] & (columns[None, :] < WIDTH)
            read_v = (read > 0)[:, None] & (v_columns[None, :] < V_WIDTH)
            keys = tl.load(k + at[:, None] * k_row + columns[None, :] * k_column, mask=read_k)
            values = tl.load(
                v + at[:, None] * v_row + v_columns[None, :] * v_column, mask=read_v, other=0.0
            )
            if CODES:
                row = pair.to(tl.int64) * length + at
                k_scale = tl.load(k_scales + row, mask=read > 0, other=0.0)
                v_scale = tl.load(v_scales + row, mask=read > 0, other=0.0)
                keys = keys.to(queries.dtype)
            # Zeros are put in only here, so that values are read before the keys have arrived.
            keys = tl.where(read_k, keys, 0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scales[:, None]
            if CODES:
                scores *= k_scale[None, :]
            scores = tl.where(seen > 0, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A head may see none of the positions that others see.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            if CODES:
                weights *= v_scale[None, :]
                # A weight times its scale may be smaller than float16 holds, unless divided.
                WIDE: tl.constexpr = not HALF and queries.dtype == tl.float16
                values = values.to(tl.bfloat16 if WIDE else queries.dtype)
            if HALF:
                most = tl.max(weights, 1)
                most = tl.where(most > 0.0, most, 1.0)
                found = tl.dot((weights / most[:, None]).to(tl.float16), values) * most[:, None]
            else:
                found = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            acc = acc * shrink[:, None] + found
            top = higher
    row = pair.to(tl.int64) * GROUP + rows
    if ALONE:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + row[:, None] * V_WIDTH + v_columns[None, :],
            result.to(out.dtype.element_ty),
            mask=real[:, None] & (v_columns[None, :] < V_WIDTH),
        )
    else:
        tl.store(sums + row * 2 * splits + split, top, mask=real)
        tl.store(sums + (row * 2 + 1) * splits + split, total, mask=real)
        tl.store(
            parts + (row[:, None] * splits + split) * V_WIDTH + v_columns[None, :],
            acc,
            mask=(real & (total != 0.0))[:, None] & (v_columns[None, :] < V_WIDTH),
        )


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator,unused-ignore]
def add_up(
    parts,
    sums,
    out,
    splits,
    V_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # at least `splits`, a power of 2
):
    """Add up what the programs of a query head found; zeros if that head sees nothing."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, ROWS)
    there = split < splits
    top = tl.load(sums + row * 2 * splits + split, mask=there, other=float("-inf"))
    total = tl.load(sums + (row * 2 + 1) * splits + split, mask=there, other=0.0)
    acc = tl.load(
        parts + (row * splits + split[:, None]) * V_WIDTH + column[None, :],
        mask=(total != 0.0)[:, None] & (column[None, :] < V_WIDTH),
        other=0.0,
    )
    highest = tl.max(top, 0)
    weights = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    over = tl.sum(weights * total, 0)
    result = tl.sum(weights[:, None] * acc, 0) / tl.where(over == 0.0, 1.0, over)
    tl.store(out + row * V_WIDTH + column, result.to(out.dtype.element_ty), mask=column < V_WIDTH)
