// From the 16 logits of a side to its mean, and from sides to boxes: the same on the CPU and on the GPU.
#pragma once

#include "common/logistic.h"

namespace yolov9_fast {

constexpr int kBins = 16;
constexpr int kSides = 4;
constexpr int kBoxChannels = kSides * kBins;

// Mean of a side's distribution; logit k of the side is at bins[k * step].
template <class Real>
YF_HOST_DEVICE Real expected_side(const Real* bins, int step) {
  Real greatest = bins[0];
  for (int k = 1; k < kBins; ++k) greatest = bins[k * step] > greatest ? bins[k * step] : greatest;
  Real sum = Real(0), first = Real(0);
  for (int k = 0; k < kBins; ++k) {
    const Real e = exp_not_positive(bins[k * step] - greatest);
    sum += e;
    first += e * Real(k);
  }
  return first / sum;
}

// Coordinate 0..3 of the box x1, y1, x2, y2 in pixels around the point of a cell (column, row).
template <class Real>
YF_ELEMENTWISE Real box_corner(int coordinate, Real cell, Real side, Real stride) {
  const Real point = cell + Real(0.5);
  return (coordinate < 2 ? point - side : point + side) * stride;
}

// Centre and length of a box along one axis, in pixels.
template <class Real>
YF_ELEMENTWISE Real box_centre(Real cell, Real before, Real after, Real stride) {
  const Real point = cell + Real(0.5);
  return ((point - before) + (point + after)) / Real(2) * stride;
}

template <class Real>
YF_ELEMENTWISE Real box_length(Real cell, Real before, Real after, Real stride) {
  const Real point = cell + Real(0.5);
  return ((point + after) - (point - before)) * stride;
}

}  // namespace yolov9_fast
