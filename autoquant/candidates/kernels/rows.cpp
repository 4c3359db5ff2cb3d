// Products of a few rows of an activation with a weight, at the speed of memory, on CPUs.
//
// A product of one row reads each weight once, so memory bounds it. Three things keep it there.
// Weights are asked for 8 KiB ahead, since the hardware's own prefetch ends at each page. A weight
// is turned into a float with two or three instructions. And sums stay in registers: of four rows
// of the weight at a time, or of sixteen that lie in the lanes of one vector.
#include "weights.h"

namespace {

constexpr int64_t kRows = 4, kLine = 64, kAhead = 8192;
constexpr int64_t kLeastBytes = 1 << 14;  // of a weight, for a thread of its own

// The activation as floats, each row padded with zeros to `width`.
template <class T>
std::vector<float> padded(const T* x, int64_t m, int64_t k, int64_t width) {
  std::vector<float> wide(m * width, 0.0f);
  for (int64_t row = 0; row < m; row++)
    for (int64_t j = 0; j < k; j++) wide[row * width + j] = to_float(x[row * k + j]);
  return wide;
}

// -- Weights row by row: `[n, k]` ------------------------------------------------------------------

// Add the products of a cache line of each of Q rows of the weight with M rows of the activation.
template <int Q, int M, class W>
inline void add_line(Floats (&sums)[Q][M], const W* weight, int64_t k, const float* x,
                     int64_t width) {
  constexpr int64_t line = kLine / sizeof(W);
  for (int64_t j = 0; j < line; j += kLanes)
    for (int q = 0; q < Q; q++) {
      const Floats numbers = floats(weight + q * k + j);
      for (int row = 0; row < M; row++) sums[q][row] += numbers * load<Floats>(x + row * width + j);
    }
}

// Multiply M rows of the activation with Q rows of the weight, from row i on.
template <int Q, int M, class W, class Finish>
void multiply_rows(const float* x, const W* weight, int64_t i, int64_t k, int64_t width,
                   const Finish& finish) {
  constexpr int64_t line = kLine / sizeof(W);
  const W* first = weight + i * k;
  Floats sums[Q][M] = {};
  int64_t j = 0;
  for (; j + line <= k; j += line) {
    for (int q = 0; q < Q; q++)
      __builtin_prefetch(reinterpret_cast<const char*>(first + q * k + j) + kAhead);
    add_line<Q, M>(sums, first + j, k, x + j, width);
  }
  if (j < k) {
    W last[Q * line] = {};
    for (int q = 0; q < Q; q++) std::memcpy(last + q * line, first + q * k + j, (k - j) * sizeof(W));
    add_line<Q, M>(sums, last, line, x + j, width);
  }
  for (int q = 0; q < Q; q++)
    for (int row = 0; row < M; row++) finish(row, i + q, sum(sums[q][row]));
}

template <int M, class W, class Finish>
void multiply_block(const float* x, const W* weight, int64_t begin, int64_t end, int64_t k,
                    int64_t width, const Finish& finish) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) multiply_rows<kRows, M>(x, weight, i, k, width, finish);
  for (; i < end; i++) multiply_rows<1, M>(x, weight, i, k, width, finish);
}

// -- int4 in lanes ---------------------------------------------------------------------------------

template <int M>
struct Int4Sums {
  Floats of[M] = {};
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Two instructions turn 32 nibbles into bfloat16, a third multiplies pairs and adds them in float32.
template <int M>
inline void add_words(Int4Sums<M>& sums, Words words, const bfloat16* x, int64_t width) {
  alignas(64) static const struct Table {
    bfloat16 of[32];
    Table() {
      for (int i = 0; i < 32; i++) store(of + i, static_cast<float>((i & 15) - 8));
    }
  } table;
  const __m512i numbers = _mm512_load_si512(table.of);
  for (int p = 0; p < 4; p++) {
    const __m512i two = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * p), numbers);
    for (int row = 0; row < M; row++) {
      const __m512i pair = _mm512_set1_epi32(load<int32_t>(x + row * width + 2 * p));
      sums.of[row] =
          (Floats)_mm512_dpbf16_ps((__m512)sums.of[row], (__m512bh)two, (__m512bh)pair);
    }
  }
}
#endif

template <int M>
inline void add_words(Int4Sums<M>& sums, Words words, const float* x, int64_t width) {
  for (int p = 0; p < 4; p++)
    for (int odd = 0; odd < 2; odd++) {
      const Ints q = (Ints)((words >> (16 * odd + 4 * p)) & 15) - 8;
      const Floats numbers = __builtin_convertvector(q, Floats);
      for (int row = 0; row < M; row++) sums.of[row] += numbers * x[row * width + 2 * p + odd];
    }
}

template <int M, class X, class T>
void multiply_lanes(const X* x, const float* group_sums, const Int4& weight, int64_t block,
                    float* y, int64_t n) {
  const int64_t width = weight.group * weight.groups, words = weight.group / 8;
  const uint32_t* from = weight.words + block * (width / 8) * kLanes;
  Floats total[M] = {};
  for (int64_t g = 0; g < weight.groups; g++) {
    Int4Sums<M> even, odd;  // two chains of sums, since one alone waits for itself
    for (int64_t word = 0; word < words; word += 2, from += 2 * kLanes) {
      const X* columns = x + g * weight.group + 8 * word;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(from + kLanes) + kAhead);
      add_words<M>(even, load<Words>(from), columns, width);
      add_words<M>(odd, load<Words>(from + kLanes), columns + 8, width);
    }
    const auto [scale, zero] = scale_and_zero<T>(weight, block, g);
    for (int row = 0; row < M; row++)
      total[row] += (even.of[row] + odd.of[row]) * scale + zero * group_sums[row * weight.groups + g];
  }
  for (int row = 0; row < M; row++) std::memcpy(y + row * n + block * kLanes, &total[row], kLine);
}

// -- Calls -----------------------------------------------------------------------------------------

// Call `f` with an integral constant of the number of rows, four at most at a time.
template <class F>
void few_at_a_time(int64_t m, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= m; row += 4) f(row, std::integral_constant<int, 4>());
  switch (m - row) {
    case 3: return f(row, std::integral_constant<int, 3>());
    case 2: return f(row, std::integral_constant<int, 2>());
    case 1: return f(row, std::integral_constant<int, 1>());
    default: return;
  }
}

template <class T, class W, class Scale>
void rows_of(const Tensor& x, const W* weight, const std::optional<Tensor>& bias,
             const Sizes& sizes, const Scale& scale) {
  const auto [m, n, k, y] = sizes;
  const int64_t width = up_to(k, kLine / sizeof(W));
  const auto wide = padded(data<T>(x), m, k, width);
  const T* offset = bias ? data<T>(*bias) : nullptr;
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / (kLanes * (k + 1) * sizeof(W)));
  const int64_t rows = n;
  torch::stable::parallel_for(0, up_to(n, kLanes) / kLanes, grain, [&](int64_t a, int64_t b) {
    const int64_t begin = a * kLanes, end = std::min(b * kLanes, rows);
    few_at_a_time(m, [&](int64_t row, auto count) {
      const auto finish = [&](int64_t r, int64_t i, float total) {
        const float shift = offset ? to_float(offset[i]) : 0.0f;
        store(out + (row + r) * rows + i, total * scale(i) + shift);
      };
      // Each block of the weight is in the first cache when the next rows need it.
      multiply_block<count()>(wide.data() + row * width, weight, begin, end, k, width, finish);
    });
  });
}

Tensor bfloat16_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Sizes sizes = sizes_of(x, weight.size(0), bias);
  check(weight, x, "the weight");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16, "the weight is not bfloat16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == sizes.k, "x and weight do not fit");
  rows_of<bfloat16>(x, data<bfloat16>(weight), bias, sizes, [](int64_t) { return 1.0f; });
  return sizes.y;
}

Tensor int8_rows(const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const std::optional<Tensor>& bias) {
  const Sizes sizes = sizes_of(x, weight.size(0), bias);
  check_int8(x, weight, scale, sizes);
  of_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* scales = data<T>(scale);
    rows_of<T>(x, data<int8_t>(weight), bias, sizes,
               [&](int64_t i) { return to_float(scales[i]); });
  });
  return sizes.y;
}

template <class T, class X>
void lanes_of(const X* x, const std::vector<float>& group_sums, const Int4& weight,
              const std::optional<Tensor>& bias, const Sizes& sizes) {
  const auto [m, n, k, y] = sizes;
  const int64_t width = weight.group * weight.groups, rows = m, outputs = n;
  const T* offset = bias ? data<T>(*bias) : nullptr;
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / (kLanes * width / 2));
  torch::stable::parallel_for(0, n / kLanes, grain, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; block++)
      few_at_a_time(rows, [&](int64_t row, auto count) {
        float totals[count() * kLanes];
        multiply_lanes<count(), X, T>(x + row * width, group_sums.data() + row * weight.groups,
                                      weight, block, totals - block * kLanes, kLanes);
        for (int r = 0; r < count(); r++)
          for (int64_t lane = 0; lane < kLanes; lane++) {
            const int64_t i = block * kLanes + lane;
            const float shift = offset ? to_float(offset[i]) : 0.0f;
            store(out + (row + r) * outputs + i, totals[r * kLanes + lane] + shift);
          }
      });
  });
}

Tensor int4_lanes(const Tensor& x, const Tensor& words, const Tensor& scales,
                  const std::optional<Tensor>& bias) {
  const Sizes sizes = sizes_of(x, words.size(0), bias);
  check(scales, x, "the weight's scale");
  const Int4 weight = int4_of(words, scales, sizes.k);
  const int64_t width = weight.group * weight.groups, groups = weight.groups;
  of_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto wide = padded(data<T>(x), sizes.m, sizes.k, width);
    std::vector<float> group_sums(sizes.m * groups);
    for (size_t g = 0; g < group_sums.size(); g++)
      for (int64_t j = 0; j < weight.group; j++) group_sums[g] += wide[g * weight.group + j];
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (std::is_same_v<T, bfloat16>) {
      std::vector<bfloat16> same(wide.size());
      for (size_t i = 0; i < wide.size(); i++) store(&same[i], wide[i]);
      return lanes_of<T>(same.data(), group_sums, weight, bias, sizes);
    }
#endif
    lanes_of<T>(wide.data(), group_sums, weight, bias, sizes);
  });
  return sizes.y;
}

// Return the numbers `[k, n]`, the weight transposed, in the dtype of its scales.
Tensor int4_unpack(const Tensor& words, const Tensor& scales, int64_t k) {
  const Int4 weight = int4_of(words, scales, k);
  const int64_t n = words.size(0), width = 8 * words.size(1);
  const std::vector<int64_t> shape{k, n};
  Tensor numbers = torch::stable::new_empty(scales, shape);
  of_type(scales.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(numbers.mutable_data_ptr());
    // A thread writes whole rows of the result, so that no two write into one cache line.
    torch::stable::parallel_for(0, width / 8, 1, [&](int64_t a, int64_t b) {
      for (int64_t word = a; word < b; word++)
        for (int64_t block = 0; block < n / kLanes; block++) {
          const auto [scale, zero] = scale_and_zero<T>(weight, block, word * 8 / weight.group);
          const auto of = load<Words>(weight.words + (block * (width / 8) + word) * kLanes);
          for (int64_t column = 0; column < 8 && word * 8 + column < k; column++) {
            const int shift = 16 * (column % 2) + 4 * (column / 2);
            const Ints q = (Ints)((of >> shift) & 15) - 8;
            const Floats row = __builtin_convertvector(q, Floats) * scale + zero;
            store(out + (word * 8 + column) * n + block * kLanes, row);
          }
        }
    });
  });
  return numbers;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoquant, CPU, library) {
  library.impl("cpu_bfloat16_rows", TORCH_BOX(&bfloat16_rows));
  library.impl("cpu_int8_rows", TORCH_BOX(&int8_rows));
  library.impl("cpu_int4_lanes", TORCH_BOX(&int4_lanes));
  library.impl("cpu_int4_unpack", TORCH_BOX(&int4_unpack));
}
