// The outputs of decode and decode_for_assignment, shared by all their implementations.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/decode.h"
#include "common/raw_maps.h"

namespace yolov9_fast::decoding {

constexpr char kOp[] = "decode";

template <class Real>
Real* data_of(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

template <class T, class Real>
Tensor decoded(const std::vector<Tensor>& maps, const Levels<T>& levels) {
  const std::vector<int64_t> sizes{levels.batch, levels.channels - kBoxChannels + kSides, levels.anchors};
  return torch::stable::new_empty(maps[0], sizes, kScalarType<Real>);
}

template <class Real>
struct ForAssignment {
  Tensor scores, boxes, points;
  const int64_t* labels = nullptr;  // [B, rows], or null for all classes
  int64_t rows;

  template <class T>
  ForAssignment(const std::vector<Tensor>& maps, const Levels<T>& levels, const std::optional<Tensor>& wanted)
      : rows(levels.channels - kBoxChannels) {
    if (wanted.has_value()) {
      STD_TORCH_CHECK(wanted->dim() == 2 && wanted->size(0) == levels.batch && wanted->is_contiguous() &&
                          wanted->scalar_type() == ScalarType::Long,
                      kOp, ": labels: expected int64 [B, N], contiguous");
      rows = wanted->size(1);
      labels = static_cast<const int64_t*>(wanted->const_data_ptr());
    }
    // In variables: the host pass of nvcc rejects braces within these calls.
    const std::vector<int64_t> of_scores{levels.batch, rows, levels.anchors};
    const std::vector<int64_t> of_boxes{levels.batch, levels.anchors, 4}, of_points{levels.anchors, 2};
    scores = torch::stable::new_empty(maps[0], of_scores, kScalarType<Real>);
    boxes = torch::stable::new_empty(maps[0], of_boxes, kScalarType<Real>);
    points = torch::stable::new_empty(maps[0], of_points, kScalarType<Real>);
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {scores, boxes, points}; }
};

}  // namespace yolov9_fast::decoding
