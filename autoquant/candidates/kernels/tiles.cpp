// Products of many rows of an activation with a weight, by a CPU's matrix instructions (AMX).
//
// Each thread turns 32 rows of the weight into bfloat16 once, in the order of tiles, and multiplies
// all rows of the activation with them while they are in its cache. So a quantized weight costs
// little more than an unquantized one, or less, since less of it is read.
#include "weights.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

namespace {

constexpr int64_t kTile = 16, kPair = 2, kDepth = 32;  // rows, columns a step of tiles multiplies
constexpr int64_t kBlock = 2 * kTile;                  // rows of weight and activation at a time
constexpr int64_t kTileNumbers = kTile * kDepth;

// The shape of all tiles: 16 rows of 64 bytes.
struct alignas(64) Shape {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};

  Shape() {
    std::fill_n(columns, 8, 64);
    std::fill_n(rows, 8, 16);
  }
};

// Rows of an activation in bfloat16, padded with zeros to whole blocks.
struct Rows {
  int64_t m, n, k, width, rows;
  const bfloat16* x;
  const bfloat16* bias;
  bfloat16* y;
  std::vector<bfloat16> copy;

  Rows(const Tensor& x_, const Sizes& sizes, const std::optional<Tensor>& bias_)
      : m(sizes.m), n(sizes.n), k(sizes.k), width(up_to(k, kDepth)), rows(up_to(m, kBlock)),
        x(data<bfloat16>(x_)), bias(bias_ ? data<bfloat16>(*bias_) : nullptr),
        y(static_cast<bfloat16*>(sizes.y.mutable_data_ptr())) {
    STD_TORCH_CHECK(x_.scalar_type() == ScalarType::BFloat16, "tiles take bfloat16");
    if (rows == m && width == k) return;
    copy.resize(rows * width, bfloat16{0});
    for (int64_t row = 0; row < m; row++)
      std::memcpy(copy.data() + row * width, x + row * k, k * sizeof(bfloat16));
    x = copy.data();
  }
};

// Write 16 outputs of a row, of which `count` are real.
inline void write(bfloat16* to, Floats x, int64_t count) {
  if (count >= kTile) return store(to, x);
  for (int64_t i = 0; i < count; i++) store(to + i, x[i]);
}

// Multiply all rows with a block of 32 rows of the weight from i on: `[width / 32, 2, 16, 16, 2]`.
void multiply_tiles(const Rows& rows, const bfloat16* block, int64_t i, const float* scale) {
  alignas(64) float sums[kBlock * kBlock];
  const int64_t bytes = rows.width * sizeof(bfloat16);
  for (int64_t row = 0; row < rows.rows; row += kBlock) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const bfloat16* x = rows.x + row * rows.width;
    for (int64_t k = 0; k < rows.width; k += kDepth) {
      const bfloat16* weights = block + k / kDepth * 2 * kTileNumbers;
      _tile_loadd(4, x + k, bytes);
      _tile_loadd(5, x + kTile * rows.width + k, bytes);
      _tile_loadd(6, weights, 64);
      _tile_loadd(7, weights + kTileNumbers, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int64_t stride = kBlock * sizeof(float);
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + kTile, stride);
    _tile_stored(2, sums + kTile * kBlock, stride);
    _tile_stored(3, sums + kTile * kBlock + kTile, stride);
    const int64_t last = std::min(kBlock, rows.m - row);
    for (int64_t r = 0; r < last; r++)
      for (int64_t half = 0; half < kBlock && i + half < rows.n; half += kTile) {
        const int64_t count = rows.n - i - half;
        Floats y = load<Floats>(sums + r * kBlock + half);
        if (scale) y *= load<Floats>(scale + half);
        if (rows.bias)
          for (int64_t lane = 0; lane < std::min(count, kTile); lane++)
            y[lane] += to_float(rows.bias[i + half + lane]);
        write(rows.y + (row + r) * rows.n + i + half, y, count);
      }
  }
}

// Multiply with a weight whose blocks `fill(i, block, scale)` makes.
template <class Fill>
void by_blocks(const Rows& rows, const Fill& fill) {
  torch::stable::parallel_for(0, up_to(rows.n, kBlock) / kBlock, 1, [&](int64_t a, int64_t b) {
    static const Shape shape;
    std::vector<bfloat16> space(rows.width * kBlock + kLanes * 2);
    const auto address = up_to(reinterpret_cast<int64_t>(space.data()), 64);
    bfloat16* block = reinterpret_cast<bfloat16*>(address);
    alignas(64) float scale[kBlock];
    _tile_loadconfig(&shape);
    for (int64_t i = a * kBlock; i < b * kBlock; i += kBlock) {
      const bool scales = fill(i, block, scale);
      multiply_tiles(rows, block, i, scales ? scale : nullptr);
    }
    _tile_release();
  });
}

// Where a row's pairs of columns from k on lie in a block; the pairs are 16 words apart.
inline uint32_t* pairs_of(bfloat16* block, int64_t row, int64_t k) {
  bfloat16* tile = block + (k / kDepth * 2 + row / kTile) * kTileNumbers;
  return reinterpret_cast<uint32_t*>(tile) + row % kTile;
}

// 32 int8 numbers as bfloat16, which holds them exactly.
inline void put_int8(const int8_t* from, uint32_t* to) {
  const auto rounded = _mm512_cvtne2ps_pbh((__m512)floats(from + kLanes), (__m512)floats(from));
  alignas(64) uint32_t pairs[kTile];
  _mm512_store_si512(pairs, (__m512i)rounded);
  for (int64_t pair = 0; pair < kTile; pair++) to[pair * kTile] = pairs[pair];
}

Tensor int8_tiles(const Tensor& x, const Tensor& weight, const Tensor& scale,
                  const std::optional<Tensor>& bias) {
  const Sizes sizes = sizes_of(x, weight.size(0), bias);
  check_int8(x, weight, scale, sizes);
  const Rows rows(x, sizes, bias);
  const int8_t* numbers = data<int8_t>(weight);
  const bfloat16* scales = data<bfloat16>(scale);
  by_blocks(rows, [&](int64_t i, bfloat16* block, float* of_block) {
    for (int64_t row = 0; row < kBlock; row++) {
      const bool real = i + row < rows.n;
      of_block[row] = real ? to_float(scales[i + row]) : 0.0f;
      for (int64_t k = 0; k < rows.width; k += kDepth) {
        int8_t last[kDepth] = {};
        const int8_t* from = numbers + (i + row) * rows.k + k;
        if (!real || k + kDepth > rows.k) {
          if (real) std::memcpy(last, from, rows.k - k);
          from = last;
        }
        put_int8(from, pairs_of(block, row, k));
      }
    }
    return true;
  });
  return sizes.y;
}

Tensor int4_tiles(const Tensor& x, const Tensor& words, const Tensor& scales,
                  const std::optional<Tensor>& bias) {
  const Sizes sizes = sizes_of(x, words.size(0), bias);
  check(scales, x, "the weight's scale");
  const Rows rows(x, sizes, bias);
  const Int4 weight = int4_of(words, scales, rows.k);
  const int64_t stored = weight.group * weight.groups;
  by_blocks(rows, [&](int64_t i, bfloat16* block, float*) {
    for (int64_t half = 0; half < kBlock; half += kTile) {
      const int64_t first = i + half;
      const uint32_t* from = weight.words + first * (stored / 8);
      for (int64_t k = 0; k < rows.width; k += 8, from += kTile) {
        uint32_t* to = pairs_of(block, half, k) + k % kDepth / kPair * kTile;
        if (first >= rows.n) {
          std::memset(to, 0, 4 * kTile * sizeof *to);
          continue;
        }
        const auto [scale, zero] =
            scale_and_zero<bfloat16>(weight, first / kTile, k / weight.group);
        const Floats least = zero - 8.0f * scale;
        const auto of = load<Words>(from);
        for (int p = 0; p < 4; p++) {
          const auto even = __builtin_convertvector((Ints)((of >> (4 * p)) & 15), Floats);
          const auto odd = __builtin_convertvector((Ints)((of >> (4 * p + 16)) & 15), Floats);
          const auto low = _mm512_cvtneps_pbh((__m512)(even * scale + least));
          const auto high = _mm512_cvtneps_pbh((__m512)(odd * scale + least));
          const __m512i both = _mm512_or_si512(
              _mm512_cvtepu16_epi32((__m256i)low),
              _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)high), 16));
          _mm512_storeu_si512(to + p * kTile, both);
        }
      }
    }
    return false;
  });
  return sizes.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoquant, CPU, library) {
  library.impl("cpu_int8_tiles", TORCH_BOX(&int8_tiles));
  library.impl("cpu_int4_tiles", TORCH_BOX(&int4_tiles));
}

#endif
