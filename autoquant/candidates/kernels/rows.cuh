// What products of a few rows with stored weights have in common. A warp's lane is 4 * a + b.
//
// A block computes 16 * TILES columns of y, the WARPS of it taking turns along k, for m up to 8 * EIGHTS rows of x. Weights are
// the first operand of mma.m16n8k16: which columns a step of 16 takes does not matter as long as both operands agree.

// Weights are read once: they are kept out of the first cache, which x needs.
__device__ __forceinline__ uint4 load_weights(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ unsigned word(const uint4& words, int j) {
  return j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
}

__device__ __forceinline__ void multiply(float* sums, const unsigned* weights, unsigned x0, unsigned x1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x0), "r"(x1));
}

// Adds up what the block's warps have, times scale[column] if there are scales, plus bias[column] if there is a bias.
template <int warps, int tiles, int eights>
__device__ __forceinline__ void store_sums(const float (&acc)[tiles][eights][4], const float* scale, const unsigned short* bias,
                                           unsigned short* y, int m, int n, int first_column) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, a = lane >> 2, b = lane & 3;
  __shared__ float parts[warps][8 * eights][16 * tiles];
#pragma unroll
  for (int t = 0; t < tiles; ++t)
#pragma unroll
    for (int e = 0; e < eights; ++e)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int row = 8 * e + 2 * b + (v & 1);
        if (row < m) parts[warp][row][16 * t + 8 * (v >> 1) + a] = acc[t][e][v];
      }
  __syncthreads();
  for (int at = threadIdx.x; at < m * 16 * tiles; at += warps * 32) {
    const int row = at / (16 * tiles), column = at % (16 * tiles), out = first_column + column;
    if (out >= n) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += parts[w][row][column];
    if (scale) sum *= scale[out];
    if (bias) sum += __uint_as_float((unsigned)bias[out] << 16);
    unsigned short rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(sum));
    y[(size_t)row * n + out] = rounded;
  }
}

// Calls multiply(expert, first row, rows) for the rows of the `slot`th expert that has any, up to 8 * eights at a time. Rows are
// sorted by expert, and ends[expert] is the row after its last.
template <int eights, typename Multiply>
__device__ __forceinline__ void multiply_rows_of_expert(const int* ends, int experts, int slot, Multiply multiply) {
  const int lane = threadIdx.x & 31;
  for (int base = 0; base < experts; base += 32) {
    const int expert = base + lane;
    const int end = expert < experts ? ends[expert] : 0, start = 0 < expert && expert < experts ? ends[expert - 1] : 0;
    unsigned with_rows = __ballot_sync(0xFFFFFFFFu, end > start);
    const int count = __popc(with_rows);
    if (slot >= count) {
      slot -= count;
      continue;
    }
    for (; slot > 0; --slot) with_rows &= with_rows - 1;
    const int found = __ffs(with_rows) - 1;
    const int last = __shfl_sync(0xFFFFFFFFu, end, found);
    for (int first = __shfl_sync(0xFFFFFFFFu, start, found); first < last; first += 8 * eights) {
      multiply(base + found, first, min(last - first, 8 * eights));
      __syncthreads();  // the sums that the block shares have been read
    }
    return;
  }
}

// Writes zeros into the block's columns of the rows that no expert has, those behind the last end.
template <int tiles>
__device__ __forceinline__ void clear_other_rows(const int* ends, int experts, unsigned short* y, int m, int n, int first_column) {
  const int first = ends[experts - 1];
  for (int at = threadIdx.x; at < (m - first) * 16 * tiles; at += blockDim.x) {
    const int row = first + at / (16 * tiles), column = first_column + at % (16 * tiles);
    if (column < n) y[(size_t)row * n + column] = 0;
  }
}
