// Arithmetic of the detection loss: class terms of one logit; box and DFL terms of one anchor, with their gradients.
// The same on the CPU and on the GPU. Formulas: yolov9_fast/ops/_detection_loss.py.
#pragma once

#include <cmath>

#include "common/decode.h"
#include "common/logistic.h"

namespace yolov9_fast {

constexpr double kFocalAlpha = 0.25;

template <class Real>
struct ValueAndGradient {
  Real value, gradient;
};

template <class Real>
struct ClassOptions {
  Real pos_weight, label_smoothing, focal_gamma;
};

// Class term of a logit whose target is 0, as nearly all are; vectorises.
template <class Real, bool kFocal>
YF_ELEMENTWISE ValueAndGradient<Real> background_class(Real x, Real focal_gamma) {
  const Real e = exp_of_minus_magnitude(x);
  const Real p = sigmoid(x, e);
  const Real bce = softplus(x, e);
  if constexpr (!kFocal) return {bce, p};
  // p^gamma = exp(gamma log p)
  const Real factor = Real(1 - kFocalAlpha) * exp_not_positive(focal_gamma * log_sigmoid(x, e));
  return {factor * bce, factor * (p + focal_gamma * (Real(1) - p) * bce)};
}

// Class term of a logit with any target t.
template <class Real>
YF_HOST_DEVICE ValueAndGradient<Real> class_term(Real x, Real t, const ClassOptions<Real>& options) {
  const Real e = exp_of_minus_magnitude(x);
  const Real p = sigmoid(x, e);
  const Real positive = options.pos_weight * t;
  const Real bce = (Real(1) - t) * x - ((options.pos_weight - Real(1)) * t + Real(1)) * log_sigmoid(x, e);
  const Real slope = (positive + Real(1) - t) * p - positive;
  const Real gamma = options.focal_gamma;
  if (!(gamma > Real(0))) return {bce, slope};
  const Real missed = t * (Real(1) - p) + (Real(1) - t) * p;
  const Real balance = t * Real(kFocalAlpha) + (Real(1) - t) * Real(1 - kFocalAlpha);
  const Real power = std::pow(missed, gamma);
  const Real missed_slope = (Real(1) - Real(2) * t) * p * (Real(1) - p);
  const Real power_slope = gamma * std::pow(missed, gamma - Real(1)) * missed_slope;
  return {bce * balance * power, balance * (slope * power + bce * power_slope)};
}

// Target of class `label` (`own`) or another one at an assigned anchor of weight w.
template <class Real>
YF_HOST_DEVICE Real class_target(bool own, Real w, Real label_smoothing) {
  const Real half = Real(0.5) * label_smoothing;
  return own ? w * (Real(1) - half) : w * half;
}

// What an element adds to a sum in which it is counted as background already: infinite there, it stays what it is.
template <class Real>
YF_HOST_DEVICE Real correction(Real value, Real background) {
  const Real difference = value - background;
  return std::isfinite(background) || std::isnan(value) ? difference : Real(0);
}

// Slope of min(a, b) in a, half where both are equal; that of max(a, b) is slope_of_min(b, a).
template <class Real>
YF_HOST_DEVICE Real slope_of_min(Real a, Real b) {
  return a == b ? Real(0.5) : (a > b ? Real(0) : Real(1));
}

template <class Real>
YF_HOST_DEVICE Real smaller(Real a, Real b) {
  return a < b || std::isnan(a) ? a : b;
}

template <class Real>
YF_HOST_DEVICE Real larger(Real a, Real b) {
  return a > b || std::isnan(a) ? a : b;
}

// One axis of the overlap of a box [a1, a2] with the wanted one [b1, b2].
template <class Real>
struct Axis {
  Real overlap, enclosing, distance;  // distance: twice that of the centres
  Real d_overlap[2], d_enclosing[2];  // slopes in a1, a2

  YF_HOST_DEVICE Axis(Real a1, Real a2, Real b1, Real b2)
      : overlap(smaller(a2, b2) - larger(a1, b1)),
        enclosing(larger(a2, b2) - smaller(a1, b1)),
        distance(b1 + b2 - (a1 + a2)),
        d_overlap{overlap < Real(0) ? Real(0) : -slope_of_min(b1, a1),
                  overlap < Real(0) ? Real(0) : slope_of_min(a2, b2)},
        d_enclosing{-slope_of_min(a1, b1), slope_of_min(b2, a2)} {
    if (overlap < Real(0)) overlap = Real(0);
  }
};

// 1 - CIoU of box a with the wanted box b (x1, y1, x2, y2), and its slopes in a; alpha held fixed.
template <class Real>
YF_HOST_DEVICE Real ciou_loss(const Real a[4], const Real b[4], Real slopes[4]) {
  constexpr Real kEps = Real(1e-7);
  constexpr Real kFourOverPiSquared = Real(0.405284734569351085775517852838910);
  const Axis<Real> x(a[0], a[2], b[0], b[2]), y(a[1], a[3], b[1], b[3]);
  const Real width = a[2] - a[0], height = a[3] - a[1] + kEps;
  const Real wanted_width = b[2] - b[0], wanted_height = b[3] - b[1] + kEps;
  const Real both = x.overlap * y.overlap;
  const Real either = width * height + wanted_width * wanted_height - both + kEps;
  const Real iou = both / either;
  const Real diagonal = x.enclosing * x.enclosing + y.enclosing * y.enclosing + kEps;
  const Real distance = (x.distance * x.distance + y.distance * y.distance) / Real(4);
  const Real turn = std::atan(wanted_width / wanted_height) - std::atan(width / height);
  const Real v = kFourOverPiSquared * (turn * turn);
  const Real alpha = v / (v - iou + (Real(1) + kEps));
  // atan(w / h): slope h / (w^2 + h^2) in w, -w / (w^2 + h^2) in h
  const Real turn_slope = -Real(2) * kFourOverPiSquared * alpha * turn / (width * width + height * height);
  for (int end = 0; end < 2; ++end) {
    const Real sign = end == 0 ? Real(-1) : Real(1);
    const Real both_x = x.d_overlap[end] * y.overlap, both_y = x.overlap * y.d_overlap[end];
    const Real iou_x = (both_x - iou * (sign * height - both_x)) / either;
    const Real iou_y = (both_y - iou * (sign * width - both_y)) / either;
    const Real centre_x =
        (-x.distance / Real(2) - distance / diagonal * (Real(2) * x.enclosing * x.d_enclosing[end])) / diagonal;
    const Real centre_y =
        (-y.distance / Real(2) - distance / diagonal * (Real(2) * y.enclosing * y.d_enclosing[end])) / diagonal;
    slopes[2 * end] = centre_x - iou_x + turn_slope * (sign * height);
    slopes[2 * end + 1] = centre_y - iou_y - turn_slope * (sign * width);
  }
  return Real(1) - (iou - (distance / diagonal + v * alpha));
}

template <class Real>
struct AnchorTerms {
  Real box, dfl;
};

// The factors of the gradients of the two terms.
template <class Real>
struct AnchorScales {
  Real box, dfl;
};

// Distribution of one side: probabilities in place of the 16 logits; returns their mean, and log of the sum.
template <class Real>
YF_HOST_DEVICE Real side_distribution(Real bins[kBins], Real& greatest, Real& log_sum) {
  greatest = bins[0];
  for (int k = 1; k < kBins; ++k) greatest = bins[k] > greatest ? bins[k] : greatest;
  Real sum = Real(0), first = Real(0);
  for (int k = 0; k < kBins; ++k) bins[k] = exp_not_positive(bins[k] - greatest);
  for (int k = 0; k < kBins; ++k) {
    sum += bins[k];
    first += bins[k] * Real(k);
  }
  log_sum = std::log(sum);
  const Real inverse = Real(1) / sum;
  for (int k = 0; k < kBins; ++k) bins[k] *= inverse;
  return first * inverse;
}

// Terms of an assigned anchor of weight w at point (x, y) in units of the stride, learning `wanted` in the same units.
// bins[64]: logits on entry; on return, if kGradient, the gradients.
template <class Real, bool kGradient>
YF_HOST_DEVICE AnchorTerms<Real> anchor_terms(Real bins[kBoxChannels], Real x, Real y, const Real wanted[4], Real w,
                                              const AnchorScales<Real>& scales) {
  const Real point[2] = {x, y};
  Real sides[kSides], fractions[kSides];
  int lower[kSides];
  AnchorTerms<Real> terms{Real(0), Real(0)};
  for (int side = 0; side < kSides; ++side) {
    Real* mine = bins + side * kBins;
    Real distance = side < 2 ? point[side] - wanted[side] : wanted[side] - point[side - 2];
    distance = distance < Real(0) ? Real(0) : distance;
    distance = distance > Real(kBins - 1 - 0.01) ? Real(kBins - 1 - 0.01) : distance;
    // A box that is no number asks for no bin; its terms are NaN all the same.
    lower[side] = std::isnan(distance) ? 0 : static_cast<int>(distance);
    fractions[side] = distance - Real(lower[side]);
    const Real below = mine[lower[side]], above = mine[lower[side] + 1];
    Real greatest, log_sum;
    sides[side] = side_distribution(mine, greatest, log_sum);
    const Real log_below = below - greatest - log_sum, log_above = above - greatest - log_sum;
    terms.dfl -= (Real(1) - fractions[side]) * log_below + fractions[side] * log_above;
  }
  terms.dfl *= w / Real(kSides);
  const Real box[4] = {x - sides[0], y - sides[1], x + sides[2], y + sides[3]};
  Real slopes[4];
  terms.box = ciou_loss(box, wanted, slopes) * w;
  if constexpr (kGradient) {
    const Real dfl_scale = scales.dfl * w / Real(kSides);
    for (int side = 0; side < kSides; ++side) {
      Real* mine = bins + side * kBins;
      const Real side_scale = scales.box * w * (side < 2 ? -slopes[side] : slopes[side]);
      const Real mean = sides[side], fraction = fractions[side];
      const Real below = mine[lower[side]], above = mine[lower[side] + 1];
      for (int k = 0; k < kBins; ++k) mine[k] *= side_scale * (Real(k) - mean) + dfl_scale;
      mine[lower[side]] = side_scale * (Real(lower[side]) - mean) * below + dfl_scale * (below - (Real(1) - fraction));
      mine[lower[side] + 1] = side_scale * (Real(lower[side] + 1) - mean) * above + dfl_scale * (above - fraction);
    }
  }
  return terms;
}

}  // namespace yolov9_fast
