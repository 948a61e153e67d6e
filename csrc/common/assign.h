// Task-aligned assignment: the arithmetic that the CPU's and the GPU's kernels share, rounded step by step as the eager
// reference rounds it (yolov9_fast/ops/_assign.py), so that all agree bit for bit. Compile without contraction.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace yolov9_fast::tal {

enum Rule : int64_t { kYolov9 = 0, kUltralytics = 1, kMit = 2 };

constexpr float kEps = 1e-7f;
constexpr float kInsideEps = 1e-9f;
constexpr float kMetricEps = 1e-9f;
// REG_MAX - 1.01 strides, the farthest side that rule "mit" lets an anchor learn.
constexpr float kReach = 14.99f;

struct Box {
  float x1, y1, x2, y2;
};

// A box with what every pair would otherwise compute again.
struct Shape {
  Box box;
  float area, aspect;
};

// atan(width / height) to 1.7 units of 2^-24: an odd polynomial (minimax on [0, 1], relative error 1.7e-8) of the
// smaller side over the larger one. Only +, -, *, / and comparisons, so that no mathematics library has a say in the
// bits.
YF_HOST_DEVICE float aspect(float width, float height) {
  const float w = fabsf(width), h = fabsf(height);
  const bool wide = h < w;
  const float t = (wide ? h : w) / (wide ? w : h);
  const float s = t * t;
  float p = 0.002920687897130847f;
  p = p * s + -0.01636791042983532f;
  p = p * s + 0.04321183264255524f;
  p = p * s + -0.07552211731672287f;
  p = p * s + 0.10666003823280334f;
  p = p * s + -0.14211055636405945f;
  p = p * s + 0.19993773102760315f;
  p = p * s + -0.33333152532577515f;
  const float angle = t + t * (s * p);
  const float folded = wide ? 1.5707963267948966f - angle : angle;
  return (width < 0.0f) != (height < 0.0f) ? -folded : folded;
}

YF_HOST_DEVICE Shape shape_of(const Box& box) {
  const float width = box.x2 - box.x1, height = box.y2 - box.y1 + kEps;
  return {box, width * height, aspect(width, height)};
}

YF_HOST_DEVICE float lower(float a, float b) { return a < b ? a : b; }
YF_HOST_DEVICE float upper(float a, float b) { return a > b ? a : b; }
YF_HOST_DEVICE float above_zero(float x) { return x > 0.0f ? x : 0.0f; }

// What is not finite counts as nothing.
YF_HOST_DEVICE float finite_positive(float x) { return (x > 0.0f) & (x <= FLT_MAX) ? x : 0.0f; }

YF_HOST_DEVICE float intersection(const Box& a, const Box& b) {
  return above_zero(lower(a.x2, b.x2) - upper(a.x1, b.x1)) * above_zero(lower(a.y2, b.y2) - upper(a.y1, b.y1));
}

// max(CIoU, 0). Coordinates that are not finite make an area, the diagonal or the distance so, and the overlap 0,
// whatever a minimum made of them: no care for NaN in the steps. Without an intersection CIoU is not positive.
YF_HOST_DEVICE float overlap(const Shape& gt, const Shape& predicted) {
  const Box &a = gt.box, &b = predicted.box;
  const float inter = intersection(a, b);
  const float iou = inter / (gt.area + predicted.area - inter + kEps);
  const float width = upper(a.x2, b.x2) - lower(a.x1, b.x1);
  const float height = upper(a.y2, b.y2) - lower(a.y1, b.y1);
  const float diagonal = width * width + height * height + kEps;
  const float dx = b.x1 + b.x2 - (a.x1 + a.x2), dy = b.y1 + b.y2 - (a.y1 + a.y2);
  const float distance = (dx * dx + dy * dy) * 0.25f;
  const float turn = predicted.aspect - gt.aspect;
  const float v = 0.4052847345693511f * (turn * turn);
  const float alpha = v / (v - iou + 1.0000001f);
  return finite_positive(iou - (distance / diagonal + v * alpha));
}

// An exponent >= 0: multiples of 1/2 by roots and products, which every machine rounds alike; others in double, where
// libraries differ too little for float32 to see.
struct Exponent {
  double value;
  int halves;

  static Exponent of(double value) {
    const double twice = 2 * value;
    return {value, twice <= 64 && twice == std::floor(twice) ? static_cast<int>(twice) : -1};
  }
};

YF_HOST_DEVICE float power(float x, const Exponent& exponent) {
  if (exponent.halves < 0) return static_cast<float>(pow(static_cast<double>(x), exponent.value));
  float result = exponent.halves & 1 ? sqrtf(x) : 1.0f;
  for (int whole = exponent.halves >> 1; whole > 0; whole >>= 1) {
    if (whole & 1) result = result * x;
    x = x * x;
  }
  return result;
}

YF_HOST_DEVICE float metric(float score, float overlap, const Exponent& alpha, const Exponent& beta) {
  return finite_positive(power(finite_positive(score), alpha) * power(overlap, beta));
}

// `metric` with the published exponents, free of branches.
YF_HOST_DEVICE float published_metric(float score, float overlap) {
  const float square = overlap * overlap;
  return finite_positive(sqrtf(finite_positive(score)) * (square * (square * square)));
}

YF_HOST_DEVICE float weight(float metric, float best_metric, float best_overlap) {
  return finite_positive(metric * best_overlap / (best_metric + kMetricEps));
}

// With & for &&, here and above: no branches, so that loops over sixteen anchors become vectors.
YF_HOST_DEVICE bool strictly_inside(float x, float y, const Box& box) {
  return (x - box.x1 > kInsideEps) & (y - box.y1 > kInsideEps) & (box.x2 - x > kInsideEps) & (box.y2 - y > kInsideEps);
}

// The box with sides of at least `least`: a shorter one is lengthened about its middle.
YF_HOST_DEVICE Box widened(Box box, float least) {
  const float half = least * 0.5f;
  if (box.x2 - box.x1 < least) {
    const float middle = (box.x1 + box.x2) * 0.5f;
    box.x1 = middle - half, box.x2 = middle + half;
  }
  if (box.y2 - box.y1 < least) {
    const float middle = (box.y1 + box.y2) * 0.5f;
    box.y1 = middle - half, box.y2 = middle + half;
  }
  return box;
}

// Inside or on the border, and no side farther than `reach`.
YF_HOST_DEVICE bool within_reach(float x, float y, const Box& box, float reach) {
  const float left = x - box.x1, top = y - box.y1, right = box.x2 - x, bottom = box.y2 - y;
  return (left >= 0.0f) & (top >= 0.0f) & (right >= 0.0f) & (bottom >= 0.0f) & (left <= reach) & (top <= reach) &
         (right <= reach) & (bottom <= reach);
}

YF_HOST_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Non-negative floats order like their bits; with the index's complement below, keys are unique and ties go to the
// lowest.
YF_HOST_DEVICE uint64_t key_of(float value, int64_t index) {
  return static_cast<uint64_t>(bits_of(value)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
YF_HOST_DEVICE int64_t index_of(uint64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

// An anchor's claims in one word: the highest key of overlap and ground truth, and in the sign bit, which keys never
// use, whether there was more than one. 0: no claim. The word does not depend on the order of the claims.
constexpr uint64_t kContested = uint64_t{1} << 63;
YF_HOST_DEVICE uint64_t with_claim(uint64_t word, uint64_t key) {
  if (word == 0) return key;
  const uint64_t best = word & ~kContested;
  return (best > key ? best : key) | kContested;
}

}  // namespace yolov9_fast::tal
