// Runs of elements of any floating dtype to float or double and back, in loops that vectorise.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace yolov9_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// `step`: elements from one to the next in memory; the other side is dense.
template <class T, class Real>
inline void load_run(const T* source, int64_t step, Real* run, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) run[i] = static_cast<Real>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) run[i] = static_cast<Real>(source[i * step]);
  }
}

template <class T, class Real>
inline void store_run(const Real* run, T* target, int64_t step, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(run[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * step] = static_cast<T>(run[i]);
  }
}

// bfloat16 is the upper half of a float; rounding to nearest even adds 0x7FFF plus the lowest bit that stays.
inline void load_run(const BFloat16* source, int64_t step, float* run, int64_t count) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t wide = static_cast<uint32_t>(bits[i * step]) << 16;
    std::memcpy(run + i, &wide, sizeof wide);
  }
}

inline uint16_t bfloat16_bits(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  const uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((wide & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline void store_run(const float* run, BFloat16* target, int64_t step, int64_t count) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(target);
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) bits[i] = bfloat16_bits(run[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) bits[i * step] = bfloat16_bits(run[i]);
  }
}

#ifdef __F16C__
inline void load_run(const Half* source, int64_t step, float* run, int64_t count) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      _mm256_storeu_ps(run + i, _mm256_cvtph_ps(eight));
    }
  }
  for (; i < count; ++i) run[i] = static_cast<float>(source[i * step]);
}

inline void store_run(const float* run, Half* target, int64_t step, int64_t count) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(run + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), eight);
    }
  }
  for (; i < count; ++i) target[i * step] = static_cast<Half>(run[i]);
}
#endif

}  // namespace yolov9_fast
