// Products of a few rows with int4 weights, and such weights unpacked, in the layout of Int4TiledTensor.
//
// A warp's lane is 4 * a + b (`rows.cuh`). Of a tile of 8 rows and 128 columns it holds row a; in word j (0 to 3) the 8 columns from
// 32 * j + 8 * b on, nibble p of the lower half being column 2 * p of these and nibble p of the upper half column 2 * p + 1.
// A pair of such nibbles, masked and put into the mantissa of two bfloat16 of exponent 7, reads 128 + q twice, which is an
// operand of mma.m16n8k16 as it is.
//
// To be defined: GROUP (32, 64, 128); for `int4_rows` and `int4_experts` also WARPS, TILES, EIGHTS and BLOCKS (blocks a
// multiprocessor should hold), for `int4_unpack` FLOAT8 (0 or 1).

#include "rows.cuh"

#define GROUPS (128 / GROUP)

__device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// (scale, zero) of a row's groups in one tile.
struct Scales {
  unsigned pairs[GROUPS];
};

__device__ __forceinline__ Scales load_scales(const unsigned* scales, size_t tile, int row) {
  Scales found;
  const unsigned* from = scales + (tile * 8 + row) * GROUPS;
#if GROUPS == 1
  found.pairs[0] = __ldg(from);
#elif GROUPS == 2
  const uint2 two = __ldg((const uint2*)from);
  found.pairs[0] = two.x, found.pairs[1] = two.y;
#else
  const uint4 four = __ldg((const uint4*)from);
  found.pairs[0] = four.x, found.pairs[1] = four.y, found.pairs[2] = four.z, found.pairs[3] = four.w;
#endif
  return found;
}

#ifdef WARPS

__device__ __forceinline__ unsigned to_pair(unsigned nibbles) {
  unsigned pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(pair) : "r"(nibbles), "n"(0x000F000F), "r"(0x43004300));
  return pair;
}

// y[m, n] = x[m, k] w[n, k]' (+ bias[n]), m at most 8 * EIGHTS. Sums over a group are of x * (128 + q); scale and zero are
// applied to them, with the sums of x alone.
__device__ __forceinline__ void
product(const unsigned short* __restrict__ x, const uint4* __restrict__ weights, const unsigned* __restrict__ scales,
        const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, int m, int n, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, a = lane >> 2, b = lane & 3;
  const int chunks = k >> 7, first_row = blockIdx.x * 16 * TILES;
  float acc[TILES][EIGHTS][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    uint4 packed[TILES][2], input[EIGHTS][4];
    Scales scale[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + 16 * t + 8 * half, n - 8);  // beyond n: computed and thrown away
        const size_t tile = (size_t)(row >> 3) * chunks + chunk;
        packed[t][half] = load_weights(weights + tile * 32 + lane);
        scale[t][half] = load_scales(scales, tile, a);
      }
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        input[e][j] = a + 8 * e < m ? __ldg((const uint4*)(x + (size_t)(a + 8 * e) * k + chunk * 128 + 32 * j + 8 * b))
                                    : make_uint4(0, 0, 0, 0);
    float dot[TILES][EIGHTS][4], total[EIGHTS][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j % (GROUP / 32) == 0)
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            total[e][v] = 0;
#pragma unroll
            for (int t = 0; t < TILES; ++t) dot[t][e][v] = 0;
          }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const unsigned ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
          const uint4& v = input[e][j];
          multiply(total[e], ones, step ? v.z : v.x, step ? v.w : v.y);
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          const unsigned upper = word(packed[t][0], j) >> (8 * step), lower = word(packed[t][1], j) >> (8 * step);
          const unsigned pairs[4] = {to_pair(upper), to_pair(lower), to_pair(upper >> 4), to_pair(lower >> 4)};
#pragma unroll
          for (int e = 0; e < EIGHTS; ++e) {
            const uint4& v = input[e][j];
            multiply(dot[t][e], pairs, step ? v.z : v.x, step ? v.w : v.y);
          }
        }
      }
      if (j % (GROUP / 32) == GROUP / 32 - 1)
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const unsigned pair = scale[t][half].pairs[j / (GROUP / 32)];
            const float factor = low(pair), offset = high(pair) - 136.f * factor;
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
              for (int v = 0; v < 2; ++v)
                acc[t][e][2 * half + v] += factor * dot[t][e][2 * half + v] + offset * total[e][v];
          }
    }
  }
  store_sums<WARPS, TILES, EIGHTS>(acc, nullptr, bias, y, m, n, first_row);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
int4_rows(const unsigned short* __restrict__ x, const uint4* __restrict__ weights, const unsigned* __restrict__ scales,
          const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, int m, int n, int k) {
  product(x, weights, scales, bias, y, m, n, k);
}

// The same of m rows sorted by expert, each with the n rows of its own expert's weight. A block has the rows of one expert.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
int4_experts(const unsigned short* __restrict__ x, const uint4* __restrict__ weights, const unsigned* __restrict__ scales,
             const int* __restrict__ ends, unsigned short* __restrict__ y, int m, int n, int k, int experts) {
  const size_t tiles = (size_t)(n >> 3) * (k >> 7);
  multiply_rows_of_expert<EIGHTS>(ends, experts, blockIdx.y, [&](int expert, int first, int rows) {
    product(x + (size_t)first * k, weights + expert * tiles * 32, scales + expert * tiles * 8 * GROUPS, nullptr,
            y + (size_t)first * n, rows, n, k);
  });
  if (blockIdx.y == 0) clear_other_rows<TILES>(ends, experts, y, m, n, blockIdx.x * 16 * TILES);
}

#else

// out[n, k], row after row: bfloat16, or float8 (e4m3) of each number over its row's scale. A warp unpacks a tile.
extern "C" __global__ void __launch_bounds__(256)
int4_unpack(const uint4* __restrict__ weights, const unsigned* __restrict__ scales, const float* __restrict__ row_scale,
            void* __restrict__ out, int tiles, int chunks) {
  const int tile = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31, a = lane >> 2, b = lane & 3;
  if (tile >= tiles) return;
  const int row = tile / chunks * 8 + a;
  const uint4 packed = load_weights(weights + (size_t)tile * 32 + lane);
  const Scales scale = load_scales(scales, tile, a);
  const float over = FLOAT8 ? 1.f / row_scale[row] : 1.f;
  const size_t first = (size_t)row * chunks * 128 + (tile % chunks) * 128 + 8 * b;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned pair = scale.pairs[j * GROUPS / 4];
    const float factor = low(pair) * over, offset = high(pair) * over - 8.f * factor;
    float values[8];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      values[2 * p] = factor * ((word(packed, j) >> (4 * p)) & 15) + offset;
      values[2 * p + 1] = factor * ((word(packed, j) >> (4 * p + 16)) & 15) + offset;
    }
#if FLOAT8
    unsigned short two[4];
#pragma unroll
    for (int p = 0; p < 4; ++p)
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two[p]) : "f"(values[2 * p + 1]), "f"(values[2 * p]));
    ((uint2*)out)[(first + 32 * j) / 8] = make_uint2(two[0] | (unsigned)two[1] << 16, two[2] | (unsigned)two[3] << 16);
#else
    unsigned two[4];
#pragma unroll
    for (int p = 0; p < 4; ++p)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two[p]) : "f"(values[2 * p + 1]), "f"(values[2 * p]));
    ((uint4*)out)[(first + 32 * j) / 8] = make_uint4(two[0], two[1], two[2], two[3]);
#endif
  }
}

#endif
