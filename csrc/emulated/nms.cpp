// nms and nms_boxes on the host by the block algorithms of common/nms_filter.h and common/nms_block.h: for tests, which
// vary the number of threads and the order of threads and blocks. `small`: buffers that a few candidates fill.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/nms_arguments.h"
#include "common/nms_filter.h"
#include "emulated/host_block.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::suppression;

template <class S>
void run_image(const Prediction& view, const Wanted& wanted, const float* one, int64_t threads, int64_t seed,
               int64_t limit, int64_t max_det, float iou, float* boxes, int64_t* anchor, int64_t* count,
               int64_t* candidates) {
  const HostBlock block(threads, seed);
  const std::vector<int64_t> parts = block_order(view.blocks(block.threads()), seed);
  Cut cut{};
  CountShared<S> counting;
  FindShared<S> finding{};
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
  STD_TORCH_CHECK(cut.stored <= limit + S::kSlack, "nms: stored keys: expected at most ", limit + S::kSlack, ", got ",
                  cut.stored);
  const auto shared = std::make_unique<Shared<S>>();
  std::vector<Kept> kept(max_det);
  suppress_image<S>(block, *shared, view, one, cut, keys.data(), limit, max_det, iou, kept.data(), boxes, anchor, count,
                    candidates);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nms(const Tensor& prediction, double conf, double iou, bool multi_label,
                                               bool agnostic, std::optional<std::vector<int64_t>> classes,
                                               int64_t max_det, int64_t max_candidates, int64_t threads, int64_t seed,
                                               bool small) {
  check_nms(prediction, conf, iou, max_det, max_candidates);
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
    STD_TORCH_CHECK(label >= 0 && label < std::min(view.classes, Wanted::kMost),
                    "nms: classes: expected known ones, got ", label);
    wanted.words[label / 32] |= 1u << label % 32;
  }
  Tensor boxes = torch::stable::new_empty(prediction, {view.images, max_det, 6});
  Tensor count = torch::stable::new_empty(prediction, {view.images}, ScalarType::Long);
  Tensor candidates = torch::stable::new_empty(prediction, {view.images}, ScalarType::Long);
  Tensor anchor = torch::stable::new_empty(prediction, {view.images, max_det}, ScalarType::Long);
  for (int64_t i = 0; i < view.images; ++i) {
    (small ? run_image<SmallSizes>
           : run_image<FullSizes>)(view, wanted, view.data + i * view.image, threads, seed, max_candidates, max_det,
                                   static_cast<float>(iou),
                                   static_cast<float*>(boxes.mutable_data_ptr()) + i * max_det * 6,
                                   static_cast<int64_t*>(anchor.mutable_data_ptr()) + i * max_det,
                                   static_cast<int64_t*>(count.mutable_data_ptr()) + i,
                                   static_cast<int64_t*>(candidates.mutable_data_ptr()) + i);
  }
  return {boxes, count, candidates, anchor};
}

template <class S>
void run_boxes(const BoxSource& source, const std::vector<uint64_t>& keys, int64_t threads, int64_t seed,
               int64_t max_det, float iou, int64_t* index, int64_t* count) {
  const auto shared = std::make_unique<Shared<S>>();
  std::vector<Kept> kept(max_det);
  suppress_boxes<S>(HostBlock(threads, seed), *shared, source, keys.data(), static_cast<int64_t>(keys.size()), max_det,
                    iou, kept.data(), index, count);
}

std::tuple<Tensor, Tensor> nms_boxes(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
                                     double iou, int64_t max_det, int64_t threads, int64_t seed, bool small) {
  check_nms_boxes(boxes, scores, labels, iou, max_det);
  const int64_t total = boxes.size(0);
  Tensor index = torch::stable::new_empty(scores, {max_det}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(scores, {}, ScalarType::Long);
  std::vector<uint64_t> keys(total);
  const float* score = static_cast<const float*>(scores.const_data_ptr());
  for (int64_t i = 0; i < total; ++i) keys[i] = candidate_key(rank_of_score(score[i]), static_cast<uint32_t>(i));
  const BoxSource source{static_cast<const Corners*>(boxes.const_data_ptr()),
                         labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr};
  (small ? run_boxes<SmallSizes> : run_boxes<FullSizes>)(source, keys, threads, seed, max_det, static_cast<float>(iou),
                                                         static_cast<int64_t*>(index.mutable_data_ptr()),
                                                         static_cast<int64_t*>(count.mutable_data_ptr()));
  return {index, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(yolov9_fast_emulated, library) {
  library.def(
      "nms(Tensor prediction, float conf, float iou, bool multi_label, bool agnostic, int[]? classes, int max_det, "
      "int max_candidates, int threads, int seed, bool small) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "nms_boxes(Tensor boxes, Tensor scores, Tensor? labels, float iou, int max_det, int threads, int seed, bool "
      "small) "
      "-> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(yolov9_fast_emulated, CPU, library) {
  library.impl("nms", TORCH_BOX(&nms));
  library.impl("nms_boxes", TORCH_BOX(&nms_boxes));
}
