// The checks of the arguments of nms and nms_boxes, for the CPU and the GPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

#include "common/dispatch.h"

namespace yolov9_fast {

inline void check_nms(const Tensor& prediction, double conf, double iou, int64_t max_det, int64_t max_candidates) {
  STD_TORCH_CHECK(prediction.dim() == 3 && prediction.size(1) > 4 && prediction.scalar_type() == ScalarType::Float,
                  "nms: prediction: expected float32 [B, 4 + nc, A] with nc of at least 1");
  STD_TORCH_CHECK(prediction.size(2) <= 1 || prediction.stride(2) == 1,
                  "nms: prediction: expected adjacent anchors, got stride ", prediction.stride(2));
  STD_TORCH_CHECK((prediction.size(1) - 4) * prediction.size(2) < int64_t{1} << 32,
                  "nms: prediction: expected fewer than 2^32 pairs of anchor and class");
  STD_TORCH_CHECK(conf >= 0 && iou >= 0, "nms: conf, iou: expected at least 0, got ", conf, " and ", iou);
  STD_TORCH_CHECK(max_det > 0 && max_candidates > 0, "nms: max_det, max_candidates: expected at least 1, got ", max_det,
                  " and ", max_candidates);
}

inline void check_nms_boxes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double iou,
                            int64_t max_det) {
  const int64_t total = boxes.size(0);
  STD_TORCH_CHECK(
      boxes.dim() == 2 && boxes.size(1) == 4 && boxes.is_contiguous() && boxes.scalar_type() == ScalarType::Float,
      "nms_boxes: boxes: expected float32 [n, 4], contiguous");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == total && scores.is_contiguous() &&
                      scores.scalar_type() == ScalarType::Float,
                  "nms_boxes: scores: expected float32 [", total, "], contiguous");
  STD_TORCH_CHECK(!labels || (labels->dim() == 1 && labels->size(0) == total && labels->is_contiguous() &&
                              labels->scalar_type() == ScalarType::Long),
                  "nms_boxes: labels: expected int64 [", total, "], contiguous");
  STD_TORCH_CHECK(total < int64_t{1} << 31, "nms_boxes: boxes: expected fewer than 2^31, got ", total);
  STD_TORCH_CHECK(iou >= 0 && max_det >= 0, "nms_boxes: iou, max_det: expected at least 0, got ", iou, " and ",
                  max_det);
}

}  // namespace yolov9_fast
