// For tests: the GPU's nms and nms_boxes, block by block and thread by thread, in orders drawn from a seed.
#include "common/nms_filter.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace yolov9_fast;
using namespace yolov9_fast::suppression;

std::vector<int64_t> order_of_blocks(int64_t count, uint32_t seed) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::minstd_rand(seed));
  return order;
}

template <class S>
void run_image(const Prediction& view, const Wanted& wanted, const float* one, int threads, uint32_t seed,
               int64_t limit, int64_t max_det, float iou, float* boxes, int64_t* anchor, int64_t* count,
               int64_t* candidates) {
  const HostBlock block(threads, seed);
  const std::vector<int64_t> parts = order_of_blocks(view.blocks(threads), seed);
  Cut cut{};
  CountShared<S> counting;
  FindShared<S> finding;
  for (int level = 0; level < 2; ++level) {
    std::vector<uint32_t> histogram(S::kBuckets);
    for (const int64_t part : parts) {
      count_part<S>(block, counting, view, wanted, one, part, level, cut, histogram.data());
    }
    pick_digit<S>(block, finding, histogram.data(), level, limit, cut);
  }
  SettleShared<S> settling;
  settle<S>(block, settling, view, wanted, one, 2, limit, cut);
  std::vector<uint64_t> keys(view.classes * view.anchors);
  StoreShared storing;
  for (const int64_t part : parts) store_part(block, storing, view, wanted, one, part, cut, keys.data());
  STD_TORCH_CHECK(cut.stored <= limit + S::kSlack, "nms_phases: ", cut.stored, " keys where the GPU has room for ",
                  limit + S::kSlack);
  const auto shared = std::make_unique<Shared<S>>();
  std::vector<Kept> kept(max_det);
  suppress_image<S>(block, *shared, view, one, cut, keys.data(), limit, max_det, iou, kept.data(), boxes, anchor, count,
                    candidates);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nms_phases(const Tensor& prediction, double conf, double iou,
                                                      bool multi_label, bool agnostic,
                                                      std::optional<std::vector<int64_t>> classes, int64_t max_det,
                                                      int64_t max_candidates, int64_t threads, int64_t seed,
                                                      bool small) {
  STD_TORCH_CHECK(prediction.dim() == 3 && prediction.size(1) > 4 && prediction.scalar_type() == ScalarType::Float &&
                      (prediction.size(2) <= 1 || prediction.stride(2) == 1),
                  "nms_phases: prediction must be float32 [B, 4 + nc, A], anchors side by side");
  STD_TORCH_CHECK(threads > 0 && max_det > 0 && max_candidates > 0, "nms_phases: counts must be positive");
  const Prediction view{static_cast<const float*>(prediction.const_data_ptr()),
                        prediction.stride(0),
                        prediction.stride(1),
                        prediction.size(0),
                        prediction.size(1) - 4,
                        prediction.size(2),
                        static_cast<float>(conf),
                        multi_label,
                        agnostic};
  Wanted wanted{};
  wanted.all = !classes.has_value();
  for (const int64_t label : classes.value_or(std::vector<int64_t>{})) {
    STD_TORCH_CHECK(label >= 0 && label < std::min(view.classes, Wanted::kMost), "nms_phases: class ", label);
    wanted.words[label / 32] |= 1u << label % 32;
  }
  Tensor boxes = torch::stable::new_empty(prediction, {view.images, max_det, 6});
  Tensor count = torch::stable::new_empty(prediction, {view.images}, ScalarType::Long);
  Tensor candidates = torch::stable::new_empty(prediction, {view.images}, ScalarType::Long);
  Tensor anchor = torch::stable::new_empty(prediction, {view.images, max_det}, ScalarType::Long);
  for (int64_t i = 0; i < view.images; ++i) {
    (small ? run_image<SmallSizes> : run_image<FullSizes>)(
        view, wanted, view.data + i * view.image, static_cast<int>(threads), static_cast<uint32_t>(seed),
        max_candidates, max_det, static_cast<float>(iou), static_cast<float*>(boxes.mutable_data_ptr()) + i * max_det * 6,
        static_cast<int64_t*>(anchor.mutable_data_ptr()) + i * max_det,
        static_cast<int64_t*>(count.mutable_data_ptr()) + i, static_cast<int64_t*>(candidates.mutable_data_ptr()) + i);
  }
  return {boxes, count, candidates, anchor};
}

template <class S>
void run_boxes(const BoxSource& source, const std::vector<uint64_t>& keys, int threads, uint32_t seed, int64_t max_det,
               float iou, int64_t* index, int64_t* count) {
  const auto shared = std::make_unique<Shared<S>>();
  std::vector<Kept> kept(max_det);
  suppress_boxes<S>(HostBlock(threads, seed), *shared, source, keys.data(), static_cast<int64_t>(keys.size()), max_det,
                    iou, kept.data(), index, count);
}

std::tuple<Tensor, Tensor> nms_boxes_phases(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
                                            double iou, int64_t max_det, int64_t threads, int64_t seed, bool small) {
  const int64_t total = boxes.size(0);
  STD_TORCH_CHECK(boxes.is_contiguous() && boxes.scalar_type() == ScalarType::Float && scores.size(0) == total &&
                      scores.is_contiguous() && scores.scalar_type() == ScalarType::Float &&
                      (!labels || (labels->size(0) == total && labels->is_contiguous() &&
                                   labels->scalar_type() == ScalarType::Long)),
                  "nms_boxes_phases: dense float32 boxes [n, 4] and scores [n], int64 labels [n]");
  STD_TORCH_CHECK(threads > 0 && max_det >= 0, "nms_boxes_phases: counts must not be negative");
  Tensor index = torch::stable::new_empty(scores, {max_det}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(scores, {}, ScalarType::Long);
  std::vector<uint64_t> keys(total);
  const float* score = static_cast<const float*>(scores.const_data_ptr());
  for (int64_t i = 0; i < total; ++i) keys[i] = candidate_key(rank_of_score(score[i]), static_cast<uint32_t>(i));
  const BoxSource source{static_cast<const Corners*>(boxes.const_data_ptr()),
                         labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr};
  (small ? run_boxes<SmallSizes> : run_boxes<FullSizes>)(
      source, keys, static_cast<int>(threads), static_cast<uint32_t>(seed), max_det, static_cast<float>(iou),
      static_cast<int64_t*>(index.mutable_data_ptr()), static_cast<int64_t*>(count.mutable_data_ptr()));
  return {index, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("nms_phases", TORCH_BOX(&nms_phases));
  library.impl("nms_boxes_phases", TORCH_BOX(&nms_boxes_phases));
}
