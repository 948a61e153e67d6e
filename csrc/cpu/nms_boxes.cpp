// nms_boxes on the CPU: one sort of all candidates; then each is compared with the kept boxes of its label,
// sixteen at a time.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common/nms.h"
#include "common/nms_arguments.h"
#include "cpu/kept_boxes.h"
#include "cpu/sort_keys.h"

namespace {

using namespace yolov9_fast;

// Labels as given, which may be any integers, to 0, 1, 2 …; returns how many there are.
int64_t number_labels(const int64_t* labels, int64_t count, std::vector<int32_t>& numbers) {
  std::unordered_map<int64_t, int32_t> known;
  numbers.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    numbers[i] = known.try_emplace(labels[i], static_cast<int32_t>(known.size())).first->second;
  }
  return static_cast<int64_t>(known.size());
}

std::tuple<Tensor, Tensor> nms_boxes(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
                                     double iou, int64_t max_det) {
  check_nms_boxes(boxes, scores, labels, iou, max_det);
  const int64_t total = boxes.size(0);
  Tensor index = torch::stable::new_empty(scores, {max_det}, ScalarType::Long);
  Tensor count = torch::stable::new_zeros(scores, {}, ScalarType::Long);
  int64_t* kept_index = static_cast<int64_t*>(index.mutable_data_ptr());
  std::fill_n(kept_index, max_det, int64_t{-1});
  if (total == 0 || max_det == 0) return {index, count};

  const float* score = static_cast<const float*>(scores.const_data_ptr());
  std::vector<uint64_t> keys(total), scratch;
  for (int64_t i = 0; i < total; ++i) keys[i] = candidate_key(rank_of_score(score[i]), static_cast<uint32_t>(i));
  sort_keys(keys.data(), total, scratch);

  std::vector<int32_t> numbers;
  const int64_t groups =
      labels ? number_labels(static_cast<const int64_t*>(labels->const_data_ptr()), total, numbers) : 1;
  const Corners* box = static_cast<const Corners*>(boxes.const_data_ptr());
  KeptBoxes kept(groups, static_cast<float>(iou));
  int64_t survivors = 0;
  for (int64_t i = 0; i < total && survivors < max_det; ++i) {
    const uint32_t candidate = index_of_key(keys[i]);
    const int32_t group = labels ? numbers[candidate] : 0;
    const float area = signed_area(box[candidate]);
    if (kept.suppress(group, box[candidate], area)) continue;
    kept.add(group, box[candidate], area);
    kept_index[survivors++] = candidate;
  }
  *static_cast<int64_t*>(count.mutable_data_ptr()) = survivors;
  return {index, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("nms_boxes", TORCH_BOX(&nms_boxes)); }
