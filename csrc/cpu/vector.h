// Vectors of one register for the CPU kernels: loads and stores of every floating type, e^x and the sigmoid.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dispatch.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace yolov9_fast {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kRegisterBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(A));

using Floats = Vector<float>;
using Doubles = Vector<double>;
typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kRegisterBytes / 2)));

// a * b + c with one rounding where the CPU has it; the compiler may not contract by itself (see csrc/build.py).
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// All lanes of a register, or its first `count`: the rest reads as zero and is not written.
struct AllLanes {};
struct FirstLanes {
  int count;
};

inline Floats load(const float* source, AllLanes) {
  Floats values;
  std::memcpy(&values, source, sizeof values);
  return values;
}

inline Doubles load(const double* source, AllLanes) {
  Doubles values;
  std::memcpy(&values, source, sizeof values);
  return values;
}

inline void store(float* target, Floats values, AllLanes) { std::memcpy(target, &values, sizeof values); }
inline void store(double* target, Doubles values, AllLanes) { std::memcpy(target, &values, sizeof values); }

// Vectors of 16-bit values to float32 and back: one instruction each way, masked loads and stores too.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define YF_AVX512_HALVES
inline Floats widened(__m256i bits, BFloat16) {
  // Each value becomes the upper half of its lane, and the lower half zero: one permutation instead of a zero
  // extension and a shift, which cost a pass over a bfloat16 map more than its loads.
  const __m512i places = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                          4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (Floats)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, places, _mm512_castsi256_si512(bits));
}
inline Floats widened(__m256i bits, Half) { return (Floats)_mm512_cvtph_ps(bits); }
inline __m256i narrowed(Floats values, Half) {
  return _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

inline Floats load(const BFloat16* source, AllLanes) {
#if defined(YF_AVX512_HALVES)
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)), BFloat16{});
#else
  HalfBits bits;
  std::memcpy(&bits, source, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Bits) << 16);
#endif
}

// Rounded to nearest even.
inline HalfBits to_bfloat16(Floats values) {
#if defined(__AVX512BF16__) && defined(YF_AVX512_HALVES)
  // The instruction makes values below 2^-126 zero; they are rare and take the other way.
  constexpr int denormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)values, denormal) == 0, true))
    return (HalfBits)_mm512_cvtneps_pbh((__m512)values);
#endif
  const Bits bits = (Bits)values;
  // A NaN keeps its upper half and becomes quiet, as rounding could make it an infinity.
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits chosen = values == values ? rounded : bits | 0x400000;
  return __builtin_convertvector(chosen >> 16, HalfBits);
}

#if defined(YF_AVX512_HALVES)
inline __m256i narrowed(Floats values, BFloat16) { return (__m256i)to_bfloat16(values); }
#endif

inline void store(BFloat16* target, Floats values, AllLanes) {
  const HalfBits bits = to_bfloat16(values);
  std::memcpy(target, &bits, sizeof bits);
}

inline Floats load(const Half* source, AllLanes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Floats values;
  for (int i = 0; i < kLanes<float>; ++i) values[i] = static_cast<float>(source[i]);
  return values;
#endif
}

inline void store(Half* target, Floats values, AllLanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) target[i] = static_cast<Half>(values[i]);
#endif
}

template <typename T>
Vector<Compute<T>> load(const T* source, FirstLanes lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.count) - 1), source);
  }
#endif
#if defined(YF_AVX512_HALVES)
  if constexpr (sizeof(T) == 2) {
    return widened(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes.count) - 1), source), T{});
  }
#endif
  alignas(64) T padded[kLanes<Compute<T>>] = {};
  std::memcpy(static_cast<void*>(padded), source, lanes.count * sizeof(T));
  return load(padded, AllLanes{});
}

template <typename T>
void store(T* target, Vector<Compute<T>> values, FirstLanes lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << lanes.count) - 1), (__m512)values);
    return;
  }
#endif
#if defined(YF_AVX512_HALVES)
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << lanes.count) - 1), narrowed(values, T{}));
    return;
  }
#endif
  alignas(64) T padded[kLanes<Compute<T>>];
  store(padded, values, AllLanes{});
  std::memcpy(static_cast<void*>(target), padded, lanes.count * sizeof(T));
}

// The values that a map of type T holds once they are stored in it.
template <typename T>
Vector<Compute<T>> rounded_to(Vector<Compute<T>> values) {
  if constexpr (std::is_same_v<T, Compute<T>>) return values;
  alignas(64) T stored[kLanes<Compute<T>>];
  store(stored, values, AllLanes{});
  return load(stored, AllLanes{});
}

template <typename A>
Vector<A> broadcast(A value) {
  return Vector<A>{} + value;
}

template <typename A>
A sum_of_lanes(Vector<A> values) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps((__m512)values);
  if constexpr (std::is_same_v<A, double>) return _mm512_reduce_add_pd((__m512d)values);
#endif
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += values[i];
  return sum;
}

// e^-x for |x| <= 87, else that of the nearer end: 2^n e^-r with |r| <= ln 2 / 2; to 1 ulp for |x| <= 10, 4 at the
// ends. e^-r = 1 - r + r^2 p(r); p by Lawson's iteration towards the least relative maximum error, 0.05 ulp. A NaN
// gives any value. Every operation here counts: the passes with a SiLU consist of little else.
inline Floats inverse_exponential(Floats x) {
#if defined(__AVX512DQ__)
  // The smaller of both magnitudes with the sign of x.
  x = (Floats)_mm512_range_ps((__m512)x, (__m512)broadcast(87.0f), 2);
#else
  const Floats upper = broadcast(87.0f), lower = broadcast(-87.0f);
  x = x > upper ? upper : x;
  x = x < lower ? lower : x;
#endif
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const Floats shifter = broadcast(12582912.0f);
  const Floats shifted = multiply_add(x, broadcast(-1.44269504f), shifter);
  const Floats n = shifted - shifter;
#if defined(__FMA__)
  const Floats r = multiply_add(n, broadcast(0.693147182f), x);
#else
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  const Floats r = n * 0.693145752f + x + n * 1.42860677e-6f;
#endif
  Floats p = broadcast(0x1.6a2430p-10f);
  p = multiply_add(p, r, broadcast(-0x1.1239e4p-7f));
  p = multiply_add(p, r, broadcast(0x1.5558f2p-5f));
  p = multiply_add(p, r, broadcast(-0x1.555492p-3f));
  p = multiply_add(p, r, broadcast(0x1.fffffcp-2f));
  p = multiply_add(multiply_add(p, r, broadcast(-1.0f)), r, broadcast(1.0f));
  return (Floats)((Bits)p + ((Bits)shifted << 23));
}

inline Doubles inverse_exponential(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(-x[i]);
  return x;
}

// 0 below -87, where e^-x stops: times x it is 0, and NaN at minus infinity, as in torch.
inline Floats sigmoid(Floats x) {
  const Floats s = 1 / (1 + inverse_exponential(x));
  return x < -87.0f ? Floats{} : s;
}

inline Doubles sigmoid(Doubles x) { return 1 / (1 + inverse_exponential(x)); }

// The sigmoid for results of 16 bits, to 2^-14 of itself: 1 / (1 + 2^t), t = -x log2(e), by an estimate of the
// reciprocal; 2^t = 2^floor(t) p(t - floor(t)), p to 3e-6. The instructions take every t: beyond the range 2^t is 0 or
// infinite, as are its limits.
inline Floats short_sigmoid(Floats x) {
#if defined(YF_AVX512_HALVES)
  const Floats t = x * -1.44269504f;
  const Floats r = (Floats)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = broadcast(0x1.b7f756p-7f);
  p = multiply_add(p, r, broadcast(0x1.abf85ap-5f));
  p = multiply_add(p, r, broadcast(0x1.ee2452p-3f));
  p = multiply_add(p, r, broadcast(0x1.62d6c6p-1f));
  p = multiply_add(p, r, broadcast(1.0f));
  return (Floats)_mm512_rcp14_ps((__m512)(1 + (Floats)_mm512_scalef_ps((__m512)p, (__m512)t)));
#else
  return sigmoid(x);
#endif
}

// The sigmoid as accurate as results of type T need it.
template <typename T>
Vector<Compute<T>> sigmoid_for(Vector<Compute<T>> x) {
  if constexpr (sizeof(T) == 2) return short_sigmoid(x);
  return sigmoid(x);
}

template <typename T>
Vector<Compute<T>> silu(Vector<Compute<T>> x) {
  return x * sigmoid_for<T>(x);
}

// d silu / dx = s + x s (1 - s), s = sigmoid(x).
template <typename T>
Vector<Compute<T>> silu_slope(Vector<Compute<T>> x) {
  const Vector<Compute<T>> s = sigmoid_for<T>(x);
  return multiply_add(x * s, 1 - s, s);
}

}  // namespace yolov9_fast
