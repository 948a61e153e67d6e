// The checked arguments of assign as pointers, for the CPU and the GPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/assign_block.h"
#include "common/dispatch.h"

namespace yolov9_fast::tal {

constexpr char kOp[] = "assign";

// Contiguous copies live here while the kernels run.
struct Arguments {
  Tensor scores, boxes, points, labels, gt_boxes, mask;
  std::optional<Tensor> sizes;  // rule kMit: strides; rule kUltralytics: the least side
  Tensor gt_index, weight;
  double alpha, beta;
  int64_t topk, rule;

  Arguments(const Tensor& scores_, const Tensor& boxes_, const Tensor& points_, const Tensor& labels_,
            const Tensor& gt_boxes_, const Tensor& mask_, const std::optional<Tensor>& sizes_, int64_t topk_,
            double alpha_, double beta_, int64_t rule_)
      : scores(scores_),
        boxes(boxes_),
        points(torch::stable::contiguous(points_)),
        labels(torch::stable::contiguous(labels_)),
        gt_boxes(torch::stable::contiguous(gt_boxes_)),
        mask(torch::stable::contiguous(mask_)),
        sizes(sizes_),
        gt_index(torch::stable::new_empty(boxes_, {boxes_.size(0), boxes_.size(1)}, ScalarType::Long)),
        weight(torch::stable::new_empty(boxes_, {boxes_.size(0), boxes_.size(1)})),
        alpha(alpha_),
        beta(beta_),
        topk(topk_),
        rule(rule_) {
    STD_TORCH_CHECK(scores.dim() == 3 && scores.size(2) > 0, kOp, ": scores: expected [B, A, nc]");
    const int64_t batch = scores.size(0), anchors = scores.size(1), count = gt_boxes.size(1);
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(0) == batch && boxes.size(1) == anchors && boxes.size(2) == 4, kOp,
                    ": boxes: expected [B, A, 4]");
    STD_TORCH_CHECK(points.dim() == 2 && points.size(0) == anchors && points.size(1) == 2, kOp,
                    ": anchor_points: expected [A, 2]");
    STD_TORCH_CHECK(gt_boxes.dim() == 3 && gt_boxes.size(0) == batch && gt_boxes.size(2) == 4, kOp,
                    ": gt_boxes: expected [B, N, 4]");
    STD_TORCH_CHECK(labels.dim() == 2 && labels.size(0) == batch && labels.size(1) == count, kOp,
                    ": gt_labels: expected [B, N]");
    STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == batch && mask.size(1) == count, kOp,
                    ": gt_mask: expected [B, N]");
    STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float && points.scalar_type() == ScalarType::Float &&
                        gt_boxes.scalar_type() == ScalarType::Float,
                    kOp, ": boxes, anchor_points, gt_boxes: expected float32");
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && mask.scalar_type() == ScalarType::Bool, kOp,
                    ": gt_labels, gt_mask: expected int64 and bool");
    STD_TORCH_CHECK(topk >= 1 && std::min(topk, anchors) <= kMaxTopk, kOp, ": topk: expected a value in [1, ", kMaxTopk,
                    "], got ", topk);
    STD_TORCH_CHECK(rule == kYolov9 || rule == kUltralytics || rule == kMit, kOp, ": rule: expected 0, 1 or 2, got ",
                    rule);
    STD_TORCH_CHECK(anchors < INT32_MAX - kChunk && count < INT32_MAX, kOp,
                    ": boxes, gt_boxes: expected fewer than 2^31 anchors and ground truths");
    if (sizes.has_value()) sizes = torch::stable::contiguous(*sizes);
    STD_TORCH_CHECK(rule != kMit || sizes.has_value(), kOp, ": sizes: expected [A] for rule 2, got none");
    STD_TORCH_CHECK(rule != kYolov9 || !sizes.has_value(), kOp, ": sizes: expected none for rule 0");
    STD_TORCH_CHECK(!sizes.has_value() || (sizes->dim() == 1 && sizes->size(0) == (rule == kMit ? anchors : 1) &&
                                           sizes->scalar_type() == ScalarType::Float),
                    kOp, ": sizes: expected float32 [A] for rule 2, [1] for rule 1");
  }

  bool nothing_to_do() const { return boxes.size(0) == 0 || boxes.size(1) == 0 || gt_boxes.size(1) == 0; }

  std::tuple<Tensor, Tensor> all_background() const {
    torch::stable::fill_(gt_index, -1.0);
    torch::stable::fill_(weight, 0.0);
    return {gt_index, weight};
  }

  // Without the scratch: chunks, best_metric, best_overlap.
  template <class Score>
  Problem<Score> problem() const {
    Problem<Score> p{};
    p.scores = static_cast<const Score*>(scores.const_data_ptr());
    p.scores_image = scores.stride(0), p.scores_anchor = scores.stride(1), p.scores_class = scores.stride(2);
    p.boxes = static_cast<const float*>(boxes.const_data_ptr());
    p.boxes_image = boxes.stride(0), p.boxes_anchor = boxes.stride(1), p.boxes_side = boxes.stride(2);
    p.points = static_cast<const float*>(points.const_data_ptr());
    const float* given = sizes.has_value() ? static_cast<const float*>(sizes->const_data_ptr()) : nullptr;
    p.strides = rule == kMit ? given : nullptr;
    p.min_side = rule == kMit ? nullptr : given;
    p.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    p.gt_boxes = static_cast<const float*>(gt_boxes.const_data_ptr());
    p.mask = static_cast<const bool*>(mask.const_data_ptr());
    p.batch = boxes.size(0), p.anchors = boxes.size(1), p.count = gt_boxes.size(1), p.classes = scores.size(2);
    p.alpha = Exponent::of(alpha), p.beta = Exponent::of(beta);
    p.topk = static_cast<int>(std::min(topk, p.anchors)), p.rule = rule;
    p.words = static_cast<uint64_t*>(gt_index.mutable_data_ptr());
    p.weights = static_cast<float*>(weight.mutable_data_ptr());
    return p;
  }
};

}  // namespace yolov9_fast::tal
