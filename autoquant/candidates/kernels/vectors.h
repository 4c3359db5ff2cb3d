// Vectors of 16 numbers, and checks of tensors, for the project's CPU kernels.
//
// The vectors are those of GCC and Clang: the compiler maps 16 floats to what the CPU has. Only
// where it does that badly are instructions named.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Octets __attribute__((vector_size(16)));

struct bfloat16 {
  uint16_t bits;
};

struct float8 {  // e4m3: no infinities
  uint8_t bits;
};

template <class T>
inline T load(const void* from) {
  T to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load<float>(&bits);
}

inline void store(float* to, float x) { *to = x; }
inline void store(bfloat16* to, float x) {  // to the nearest, ties to even
  uint32_t bits = load<uint32_t>(&x);
  const bool nan = x != x;
  bits += 0x7fff + ((bits >> 16) & 1);
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
}

// 16 numbers from memory as floats.
inline Floats floats(const float* from) { return load<Floats>(from); }
inline Floats floats(const bfloat16* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(load<__m256i>(from));
  return (Floats)_mm512_slli_epi32(wide, 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}
inline Floats floats(const int8_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  Floats to;
  for (int half = 0; half < 2; half++) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * half)));
    const __m256 numbers = _mm256_cvtepi32_ps(wide);
    std::memcpy(reinterpret_cast<char*>(&to) + 32 * half, &numbers, sizeof numbers);
  }
  return to;
#else
  const auto wide = __builtin_convertvector(load<Bytes>(from), Shorts);
  return __builtin_convertvector(__builtin_convertvector(wide, Ints), Floats);
#endif
}
inline Floats floats(const float8* from) {
#if defined(__AVX512F__)
  const Ints bits = (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from));
#else
  const Ints bits = __builtin_convertvector(load<Octets>(from), Ints);
#endif
  // Exponent and mantissa, moved to where float32 has them; exponents differ by 120. What has no
  // leading 1 gets one, which is subtracted.
  const Ints moved = (bits & 0x7f) << 20;
  const Floats small = (Floats)(moved + (121 << 23)) - 0x1p-6f;
  const Floats magnitude = (bits & 0x78) == 0 ? small : (Floats)(moved + (120 << 23));
  return (Floats)((Ints)magnitude | ((bits & 0x80) << 24));
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Floats x) {
  Words bits = (Words)x;
  bits += 0x7fff + ((bits >> 16) & 1);
  const Halves high = __builtin_convertvector(bits >> 16, Halves);
  std::memcpy(to, &high, sizeof high);
}

template <class T, class Whole>
inline T halves_added(const Whole& x) {
  const char* from = reinterpret_cast<const char*>(&x);
  return load<T>(from) + load<T>(from + sizeof(T));
}

inline float sum(Floats x) {
  const auto four = halves_added<Four>(halves_added<Eight>(x));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Call `f` with a null pointer to the C++ type of floating-point numbers.
template <class F>
auto of_type(ScalarType type, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "autoquant's products on CPUs take float32 and bfloat16");
  return type == ScalarType::Float ? f(static_cast<float*>(nullptr))
                                   : f(static_cast<bfloat16*>(nullptr));
}

void check(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), name, " is not contiguous on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " has another dtype than x");
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace
