// The checked arguments of detection_loss as pointers, and the terms of one assigned anchor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "common/detection_loss.h"
#include "common/map_layout.h"
#include "common/raw_maps.h"

namespace yolov9_fast::loss {

constexpr char kOp[] = "detection_loss";

template <class Real>
struct Targets {
  const int64_t* gt_index;
  const Real* weight;
  const int64_t* labels;
  const Real* boxes;
  int64_t gt_count, classes;
  ClassOptions<Real> options;
};

// The factors of the gradients of the terms.
template <class Real>
struct Scales {
  Real cls;
  AnchorScales<Real> anchor;
};

template <class Real>
struct Sums {
  Real box, cls, dfl;
};

// The terms of pixel `pixel` of an image that is assigned to ground truth `row` = image * N + n of class `label`. The
// class term is what remains after the background terms that were already counted; the gradients replace the
// background's.
template <class T, class Real, bool kGradient>
YF_HOST_DEVICE Sums<Real> assigned_anchor(const Level<T>& level, int64_t image, int64_t pixel, int64_t row,
                                          int64_t label, Real w, const Targets<Real>& targets,
                                          const Scales<Real>& scales) {
  const T* source = level.data + image * level.at.image + pixel * level.at.pixel;
  T* gradient =
      kGradient ? level.gradient + image * level.gradient_at.image + pixel * level.gradient_at.pixel : nullptr;
  Sums<Real> sums{Real(0), Real(0), Real(0)};
  const bool all_classes = targets.options.label_smoothing > Real(0);
  const int64_t first = all_classes ? 0 : label, last = all_classes ? targets.classes : label + 1;
  for (int64_t c = first; c < last; ++c) {
    const Real logit = static_cast<Real>(source[(kBoxChannels + c) * level.at.channel]);
    const Real target = class_target(c == label, w, targets.options.label_smoothing);
    const ValueAndGradient<Real> term = class_term(logit, target, targets.options);
    const Real counted = targets.options.focal_gamma > Real(0)
                             ? background_class<Real, true>(logit, targets.options.focal_gamma).value
                             : background_class<Real, false>(logit, Real(0)).value;
    sums.cls += correction(term.value, counted);
    if constexpr (kGradient) {
      gradient[(kBoxChannels + c) * level.gradient_at.channel] = static_cast<T>(term.gradient * scales.cls);
    }
  }
  Real bins[kBoxChannels];
  for (int c = 0; c < kBoxChannels; ++c) bins[c] = static_cast<Real>(source[c * level.at.channel]);
  const Real stride = static_cast<Real>(level.stride);
  Real wanted[4];
  for (int i = 0; i < 4; ++i) wanted[i] = targets.boxes[4 * row + i] / stride;
  const Real x = static_cast<Real>(pixel % level.width) + Real(0.5);
  const Real y = static_cast<Real>(pixel / level.width) + Real(0.5);
  const AnchorTerms<Real> terms = anchor_terms<Real, kGradient>(bins, x, y, wanted, w, scales.anchor);
  sums.box = terms.box;
  sums.dfl = terms.dfl;
  if constexpr (kGradient) {
    for (int c = 0; c < kBoxChannels; ++c) gradient[c * level.gradient_at.channel] = static_cast<T>(bins[c]);
  }
  return sums;
}

inline void check_dense(const Tensor& tensor, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == numel, kOp, ": ", name,
                  ": expected ", numel, " contiguous values of the right dtype, got ", tensor.numel());
}

struct Arguments {
  const std::vector<Tensor>& maps;
  const Tensor &gt_index, &weight, &gt_labels, &gt_boxes, &normaliser;
  const std::vector<int64_t>& strides;
  double pos_weight, label_smoothing, focal_gamma;
  const std::vector<double>& gains;

  template <class T>
  Levels<T> levels(const std::vector<Tensor>& gradients) const {
    return raw_maps<T>(maps, gradients, strides, kOp);
  }

  template <class Real>
  Targets<Real> targets(int64_t batch, int64_t channels, int64_t anchors) const {
    STD_TORCH_CHECK(gt_labels.dim() == 2, kOp, ": gt_labels: expected [B, N], got ", gt_labels.dim(), " dimensions");
    const int64_t gt_count = gt_labels.size(1);
    check_dense(gt_index, ScalarType::Long, batch * anchors, "gt_index");
    check_dense(weight, kScalarType<Real>, batch * anchors, "weight");
    check_dense(gt_labels, ScalarType::Long, batch * gt_count, "gt_labels");
    check_dense(gt_boxes, kScalarType<Real>, batch * gt_count * 4, "gt_boxes");
    check_dense(normaliser, kScalarType<Real>, 1, "normaliser");
    STD_TORCH_CHECK(gains.size() == 3, kOp, ": gains: expected 3 values, got ", gains.size());
    return {static_cast<const int64_t*>(gt_index.const_data_ptr()),
            static_cast<const Real*>(weight.const_data_ptr()),
            static_cast<const int64_t*>(gt_labels.const_data_ptr()),
            static_cast<const Real*>(gt_boxes.const_data_ptr()),
            gt_count,
            channels - kBoxChannels,
            {static_cast<Real>(pos_weight), static_cast<Real>(label_smoothing), static_cast<Real>(focal_gamma)}};
  }
};

inline std::vector<Tensor> empty_maps(const std::vector<Tensor>& maps) {
  std::vector<Tensor> result;
  for (const Tensor& map : maps) result.push_back(empty_map(map));
  return result;
}

}  // namespace yolov9_fast::loss
