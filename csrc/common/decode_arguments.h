// The outputs of decode and decode_for_assignment, and the choice of types, shared by all their implementations.
#pragma once

#include "common/decode.h"
#include "common/raw_maps.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace yolov9_fast::decoding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "decode";

template <class Real>
constexpr ScalarType type_of() {
  return std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
}

template <class Real>
Real* data_of(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

// Calls body(T, Real) for the maps' dtype and that of the computation.
template <class Body>
void dispatch(const std::vector<Tensor>& maps, const Body& body) {
  STD_TORCH_CHECK(!maps.empty(), kOp, ": no maps");
  const ScalarType type = maps[0].scalar_type();
  const float single = 0;
  if (type == ScalarType::Float) {
    body(single, single);
  } else if (type == ScalarType::BFloat16) {
    body(torch::headeronly::BFloat16(single), single);
  } else if (type == ScalarType::Half) {
    body(torch::headeronly::Half(single), single);
  } else {
    STD_TORCH_CHECK(type == ScalarType::Double, kOp, ": maps must be of a floating dtype");
    const double whole = 0;
    body(whole, whole);
  }
}

template <class T, class Real>
Tensor decoded(const std::vector<Tensor>& maps, const Levels<T>& levels) {
  const std::vector<int64_t> sizes{levels.batch, levels.channels - kBoxChannels + kSides, levels.anchors};
  return torch::stable::new_empty(maps[0], sizes, type_of<Real>());
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
                      kOp, ": labels must be int64 [B, N], contiguous");
      rows = wanted->size(1);
      labels = static_cast<const int64_t*>(wanted->const_data_ptr());
    }
    // Named first: nvcc's host pass stumbles over braces within a call here.
    const std::vector<int64_t> of_scores{levels.batch, rows, levels.anchors};
    const std::vector<int64_t> of_boxes{levels.batch, levels.anchors, 4}, of_points{levels.anchors, 2};
    scores = torch::stable::new_empty(maps[0], of_scores, type_of<Real>());
    boxes = torch::stable::new_empty(maps[0], of_boxes, type_of<Real>());
    points = torch::stable::new_empty(maps[0], of_points, type_of<Real>());
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {scores, boxes, points}; }
};

}  // namespace yolov9_fast::decoding
