// Products of a few rows with float8 (e4m3) weights that have a scale a row, as they lie in a Float8Tensor: [n, k], row after row.
//
// To be defined: WARPS, TILES, EIGHTS and BLOCKS (blocks a multiprocessor should hold).
//
// Sign, exponent and mantissa of an e4m3 number, put where bfloat16 has them, read as the number over 2^120, numbers without a
// leading 1 too: one multiplication for two of them makes them right.

#include "rows.cuh"

__device__ __forceinline__ unsigned times_2_120(unsigned pair) {
  unsigned product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(pair), "r"(0x7B807B80u), "r"(0x80008000u));
  return product;
}

// Of four numbers the first and third, and the second and fourth.
__device__ __forceinline__ unsigned even(unsigned four) {
  return times_2_120(((four << 4) & 0x07F007F0u) | ((four << 8) & 0x80008000u));
}

__device__ __forceinline__ unsigned odd(unsigned four) {
  return times_2_120(((four >> 4) & 0x07F007F0u) | (four & 0x80008000u));
}

// y[m, n] = x[m, k] w[n, k]' scale[n] (+ bias[n]), m at most 8 * EIGHTS, k divisible by 128 and n by 8. A lane reads 16 columns
// of row a, from 16 * b on, in each half of a chunk of 128.
__device__ __forceinline__ void
product(const unsigned short* __restrict__ x, const unsigned char* __restrict__ weights, const float* __restrict__ scale,
        const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, int m, int n, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, a = lane >> 2, b = lane & 3;
  const int chunks = k >> 7, first_row = blockIdx.x * 16 * TILES;
  float acc[TILES][EIGHTS][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    const int first = chunk * 128 + 16 * b;
    uint4 packed[2][TILES][2], input[2][EIGHTS][2];
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(first_row + 16 * t + 8 * half, n - 8) + a;  // beyond n: computed and thrown away
          packed[part][t][half] = load_weights((const uint4*)(weights + (size_t)row * k + first + 64 * part));
        }
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
          input[part][e][eight] = a + 8 * e < m
              ? __ldg((const uint4*)(x + (size_t)(a + 8 * e) * k + first + 64 * part + 8 * eight))
              : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned evens[EIGHTS], odds[EIGHTS];
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
          const uint4& eight = input[part][e][j >> 1];
          const unsigned two = j & 1 ? eight.z : eight.x, next = j & 1 ? eight.w : eight.y;
          evens[e] = __byte_perm(two, next, 0x5410), odds[e] = __byte_perm(two, next, 0x7632);
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          const unsigned upper = word(packed[part][t][0], j), lower = word(packed[part][t][1], j);
          const unsigned pairs[4] = {even(upper), even(lower), odd(upper), odd(lower)};
#pragma unroll
          for (int e = 0; e < EIGHTS; ++e) multiply(acc[t][e], pairs, evens[e], odds[e]);
        }
      }
  }
  store_sums<WARPS, TILES, EIGHTS>(acc, scale, bias, y, m, n, first_row);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
float8_rows(const unsigned short* __restrict__ x, const unsigned char* __restrict__ weights, const float* __restrict__ scale,
            const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, int m, int n, int k) {
  product(x, weights, scale, bias, y, m, n, k);
}

// The same of m rows sorted by expert, each with the n rows of its own expert's weight. A block has the rows of one expert.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
float8_experts(const unsigned short* __restrict__ x, const unsigned char* __restrict__ weights, const float* __restrict__ scale,
               const int* __restrict__ ends, unsigned short* __restrict__ y, int m, int n, int k, int experts) {
  multiply_rows_of_expert<EIGHTS>(ends, experts, blockIdx.y, [&](int expert, int first, int rows) {
    product(x + (size_t)first * k, weights + (size_t)expert * n * k, scale + (size_t)expert * n, nullptr, y + (size_t)first * n,
            rows, n, k);
  });
  if (blockIdx.y == 0) clear_other_rows<TILES>(ends, experts, y, m, n, blockIdx.x * 16 * TILES);
}
