// The weights of the project's CPU kernels, and checks of what is multiplied.
//
// int8: rows `[n, k]` with a scale each.
//
// int4 in lanes: 16 rows belong together. Their words of eight columns lie side by side:
// `[n / 16, k / 8, 16]`. Nibble (odd, p) of a word, at bit 16 * odd + 4 * p, is column 2 * p + odd.
// Scales and zeros are `[n / 16, groups, 2, 16]`. A weight is (q - 8) * scale + zero. Where all zeros
// are 0, scales alone are stored: `[n / 16, groups, 1, 16]`.
#pragma once

#include "vectors.h"

namespace {

struct Sizes {
  int64_t m, n, k;
  Tensor y;
};

// Check all but the weight, and make an empty result `[..., n]`.
Sizes sizes_of(const Tensor& x, int64_t n, const std::optional<Tensor>& bias) {
  check(x, x, "x");
  if (bias) {
    check(*bias, x, "the bias");
    STD_TORCH_CHECK(bias->numel() == n, "the bias does not have a number for each row");
  }
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); d++) shape.push_back(x.size(d));
  STD_TORCH_CHECK(!shape.empty(), "x has no dimensions");
  const int64_t k = shape.back();
  shape.back() = n;
  Tensor y = torch::stable::new_empty(x, shape);
  return {k ? x.numel() / k : 0, n, k, y};
}

void check_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, const Sizes& sizes) {
  check(scale, x, "the scale");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.is_contiguous() &&
                      weight.is_cpu(),
                  "the weight is not contiguous int8 on the CPU");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == sizes.k, "x and weight do not fit");
  STD_TORCH_CHECK(scale.numel() == sizes.n, "the weight does not have a scale for each row");
}

struct Int4 {
  const uint32_t* words;
  const void* scales;
  int64_t group, groups, parts;  // parts: 2 with zeros, or 1
};

struct ScaleAndZero {
  Floats scale, zero;
};

// The scales and zeros of a group of 16 rows.
template <class T>
inline ScaleAndZero scale_and_zero(const Int4& weight, int64_t block, int64_t group) {
  const int64_t place = (block * weight.groups + group) * weight.parts * kLanes;
  const T* from = static_cast<const T*>(weight.scales) + place;
  return {floats(from), weight.parts == 2 ? floats(from + kLanes) : Floats{}};
}

// Check a weight for an activation of k columns.
Int4 int4_of(const Tensor& words, const Tensor& scales, int64_t k) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.is_contiguous() && words.is_cpu(),
                  "the weight is not contiguous int32 on the CPU");
  STD_TORCH_CHECK(words.dim() == 2 && scales.dim() == 3 && words.size(0) % kLanes == 0 &&
                      scales.size(0) == words.size(0) &&
                      (scales.size(2) == 1 || scales.size(2) == 2),
                  "the weight and its scales do not fit");
  const int64_t width = 8 * words.size(1), groups = scales.size(1);
  STD_TORCH_CHECK(groups > 0 && width % (16 * groups) == 0 && width - k >= 0 &&
                      width - k < width / groups,
                  "x and weight do not fit");
  return {data<uint32_t>(words), scales.const_data_ptr(), width / groups, groups, scales.size(2)};
}

}  // namespace
