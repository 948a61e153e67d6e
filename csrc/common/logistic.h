// Sigmoid, log-sigmoid and exp of values that are not positive: branch-free in float, so that loops over them
// vectorise, and the same bits on a GPU and on a CPU with FMA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

// A call in a loop would prevent vectorisation.
#ifdef YF_CUDA
#define YF_ELEMENTWISE YF_HOST_DEVICE
#else
#define YF_ELEMENTWISE inline __attribute__((always_inline))
#endif

namespace yolov9_fast {

template <class Real>
YF_ELEMENTWISE Real multiply_add(Real a, Real b, Real c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

YF_ELEMENTWISE int32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

YF_ELEMENTWISE float float_of_bits(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// exp(x) for x <= 0 (NaN stays NaN), within 2 units of the last place; 0 where the result would be no normal number.
// x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 Q(r), Q minimax of degree 4 (relative error 3e-9).
YF_ELEMENTWISE float exp_not_positive(float x) {
  constexpr float kLeast = -87.33654f;   // just above ln 2^-126
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float bounded = x < kLeast ? kLeast : x;
  const float shifted = multiply_add(bounded, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = multiply_add(n, -0.693359375f, bounded);  // ln 2 in two parts, the first exact in 10 bits
  r = multiply_add(n, 2.12194440e-4f, r);
  float q = 1.381459514e-3f;
  q = multiply_add(q, r, 8.368716732e-3f);
  q = multiply_add(q, r, 4.166838808e-2f);
  q = multiply_add(q, r, 1.666652063e-1f);
  q = multiply_add(q, r, 4.999999345e-1f);
  const float mantissa = multiply_add(q, r * r, r) + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(float_bits(shifted) - 0x4B400000 + 127) << 23;
  return x < kLeast ? 0.0f : mantissa * float_of_bits(static_cast<int32_t>(exponent));
}

// log(1 + e) for e in [0, 1]: e + e^2 Q(e), Q minimax of degree 8 (relative error 8e-9).
YF_ELEMENTWISE float log1p_of_unit(float e) {
  float q = -3.677028345e-3f;
  q = multiply_add(q, e, 2.187338733e-2f);
  q = multiply_add(q, e, -6.091752024e-2f);
  q = multiply_add(q, e, 1.102471347e-1f);
  q = multiply_add(q, e, -1.556927907e-1f);
  q = multiply_add(q, e, 1.977422927e-1f);
  q = multiply_add(q, e, -2.497507863e-1f);
  q = multiply_add(q, e, 3.333224856e-1f);
  q = multiply_add(q, e, -4.999999993e-1f);
  return multiply_add(q, e * e, e);
}

YF_ELEMENTWISE double exp_not_positive(double x) { return std::exp(x); }
YF_ELEMENTWISE double log1p_of_unit(double e) { return std::log1p(e); }

template <class Real>
YF_ELEMENTWISE Real exp_of_minus_magnitude(Real x) {
  return exp_not_positive(x < Real(0) ? x : -x);
}

// 1 / (1 + exp(-x)), given e = exp(-|x|).
template <class Real>
YF_ELEMENTWISE Real sigmoid(Real x, Real e) {
  const Real inverse = Real(1) / (Real(1) + e);
  const Real below = e * inverse;
  return x >= Real(0) ? inverse : below;
}

template <class Real>
YF_ELEMENTWISE Real sigmoid(Real x) {
  return sigmoid(x, exp_of_minus_magnitude(x));
}

// log(sigmoid(x)), given e = exp(-|x|).
template <class Real>
YF_ELEMENTWISE Real log_sigmoid(Real x, Real e) {
  return (x < Real(0) ? x : Real(0)) - log1p_of_unit(e);
}

// log(1 + exp(x)), given e = exp(-|x|); NaN at minus infinity, as the difference x - log(sigmoid(x)) is there.
template <class Real>
YF_ELEMENTWISE Real softplus(Real x, Real e) {
  return (x - (x < Real(0) ? x : Real(0))) + log1p_of_unit(e);
}

}  // namespace yolov9_fast
