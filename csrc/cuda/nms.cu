// nms and nms_boxes on the GPU: the block algorithms of common/nms_filter.h and common/nms_block.h. nms reads 4·(4 +
// nc)·A bytes an image twice (count, store), a third time if there are more than max_candidates. Nothing waits for the
// host and no size depends on the data, so a CUDA graph can capture it. Grids: images along y and parts of their scores
// along x; then one block per image.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/nms_arguments.h"
#include "common/nms_filter.h"
#include "cuda/stream.cuh"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::suppression;

using S = FullSizes;
constexpr int kScan = 256;  // threads over scores
// Threads of an image's block: enough to hide the latency of reading the keys.
constexpr int kGreedy = 512;
constexpr int64_t kMaxImagesOfGrid = 65535;

__global__ void __launch_bounds__(kScan) count_kernel(const Prediction view, const __grid_constant__ Wanted wanted,
                                                      int level, const Cut* cuts, uint32_t* histograms) {
  __shared__ CountShared<S> shared;
  const int64_t image = blockIdx.y;
  count_part<S>(DeviceBlock(), shared, view, wanted, view.data + image * view.image, blockIdx.x, level, cuts[image],
                histograms + image * S::kBuckets);
}

__global__ void __launch_bounds__(kScan) pick_kernel(const uint32_t* histograms, int level, int64_t limit, Cut* cuts) {
  __shared__ FindShared<S> shared;
  const int64_t image = blockIdx.x;
  pick_digit<S>(DeviceBlock(), shared, histograms + image * S::kBuckets, level, limit, cuts[image]);
}

__global__ void __launch_bounds__(kScan)
    settle_kernel(const Prediction view, const __grid_constant__ Wanted wanted, const uint32_t* histograms, int level,
                  int64_t limit, Cut* cuts) {
  __shared__ SettleShared<S> shared;
  const int64_t image = blockIdx.x;
  pick_digit<S>(DeviceBlock(), shared.find, histograms + image * S::kBuckets, level, limit, cuts[image]);
  settle<S>(DeviceBlock(), shared, view, wanted, view.data + image * view.image, level + 1, limit, cuts[image]);
}

__global__ void __launch_bounds__(kScan) store_kernel(const Prediction view, const __grid_constant__ Wanted wanted,
                                                      Cut* cuts, uint64_t* keys, int64_t capacity) {
  __shared__ StoreShared shared;
  const int64_t image = blockIdx.y;
  store_part(DeviceBlock(), shared, view, wanted, view.data + image * view.image, blockIdx.x, cuts[image],
             keys + image * capacity);
}

__global__ void __launch_bounds__(kGreedy, 1)
    greedy_kernel(const Prediction view, const Cut* cuts, const uint64_t* keys, int64_t capacity, int64_t limit,
                  int64_t max_det, float iou, Kept* kept, float* boxes, int64_t* anchor, int64_t* count,
                  int64_t* candidates) {
  __shared__ Shared<S> shared;
  const int64_t image = blockIdx.x;
  suppress_image<S>(DeviceBlock(), shared, view, view.data + image * view.image, cuts[image], keys + image * capacity,
                    limit, max_det, iou, kept + image * max_det, boxes + image * max_det * 6, anchor + image * max_det,
                    count + image, candidates + image);
}

__global__ void __launch_bounds__(kScan) key_kernel(const float* scores, int64_t total, uint64_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScan + threadIdx.x;
  if (i < total) keys[i] = candidate_key(rank_of_score(scores[i]), static_cast<uint32_t>(i));
}

__global__ void __launch_bounds__(kGreedy, 1)
    greedy_boxes_kernel(BoxSource source, const uint64_t* keys, int64_t total, int64_t max_det, float iou, Kept* kept,
                        int64_t* index, int64_t* count) {
  __shared__ Shared<S> shared;
  suppress_boxes<S>(DeviceBlock(), shared, source, keys, total, max_det, iou, kept, index, count);
}

static_assert(sizeof(Kept) % sizeof(int64_t) == 0 && sizeof(Cut) % sizeof(int64_t) == 0);
static_assert(sizeof(Shared<S>) <= 48 * 1024, "more needs dynamic shared memory");

// Workspace for `count` items: torch allocates and keeps it for the stream, in a captured graph too.
template <class Item>
Item* items(const Tensor& workspace) {
  return static_cast<Item*>(workspace.mutable_data_ptr());
}

Tensor words(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {(bytes + 7) / 8}, ScalarType::Long);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nms(const Tensor& prediction, double conf, double iou, bool multi_label,
                                               bool agnostic, std::optional<std::vector<int64_t>> classes,
                                               int64_t max_det, int64_t max_candidates) {
  check_nms(prediction, conf, iou, max_det, max_candidates);
  const int64_t images = prediction.size(0), labels = prediction.size(1) - 4, anchors = prediction.size(2);
  STD_TORCH_CHECK(images <= kMaxImagesOfGrid, "nms: prediction: expected at most ", kMaxImagesOfGrid, " images, got ",
                  images);
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const Prediction view{static_cast<const float*>(prediction.const_data_ptr()),
                        prediction.stride(0),
                        prediction.stride(1),
                        images,
                        labels,
                        anchors,
                        static_cast<float>(conf),
                        multi_label,
                        agnostic};
  Wanted wanted{};
  wanted.all = !classes.has_value();
  for (const int64_t label : classes.value_or(std::vector<int64_t>{})) {
    STD_TORCH_CHECK(label >= 0 && label < labels && label < Wanted::kMost, "nms: classes: expected values in [0, ",
                    std::min(labels, Wanted::kMost), "), got ", label);
    wanted.words[label / 32] |= 1u << label % 32;
  }
  Tensor boxes = torch::stable::new_empty(prediction, {images, max_det, 6});
  Tensor count = torch::stable::new_empty(prediction, {images}, ScalarType::Long);
  Tensor candidates = torch::stable::new_empty(prediction, {images}, ScalarType::Long);
  Tensor anchor = torch::stable::new_empty(prediction, {images, max_det}, ScalarType::Long);
  if (images == 0) return {boxes, count, candidates, anchor};

  // There are no more candidates than pairs: a lower limit gives the same result with a smaller workspace.
  const int64_t limit = std::min(max_candidates, std::max<int64_t>(labels * anchors, 1));
  const int64_t capacity = std::min(limit + S::kSlack, labels * anchors);
  constexpr int64_t kCutWords = sizeof(Cut) / 8, kHistogramWords = S::kBuckets / 2;
  Tensor zeros = torch::stable::new_zeros(prediction, {images * (kCutWords + 2 * kHistogramWords)}, ScalarType::Long);
  Tensor key_space = words(prediction, images * capacity * sizeof(uint64_t));
  Tensor kept_space = words(prediction, images * max_det * sizeof(Kept));
  Cut* cuts = items<Cut>(zeros);
  uint32_t* first = reinterpret_cast<uint32_t*>(items<int64_t>(zeros) + images * kCutWords);
  uint32_t* second = first + images * S::kBuckets;
  uint64_t* keys = items<uint64_t>(key_space);

  const cudaStream_t stream = current_stream(prediction.get_device_index());
  const unsigned rows = static_cast<unsigned>(images);
  if (anchors > 0) {
    const dim3 parts(static_cast<unsigned>(view.blocks(kScan)), rows);
    count_kernel<<<parts, kScan, 0, stream>>>(view, wanted, 0, cuts, first);
    pick_kernel<<<rows, kScan, 0, stream>>>(first, 0, limit, cuts);
    count_kernel<<<parts, kScan, 0, stream>>>(view, wanted, 1, cuts, second);
    settle_kernel<<<rows, kScan, 0, stream>>>(view, wanted, second, 1, limit, cuts);
    store_kernel<<<parts, kScan, 0, stream>>>(view, wanted, cuts, keys, capacity);
  }
  greedy_kernel<<<rows, kGreedy, 0, stream>>>(view, cuts, keys, capacity, limit, max_det, static_cast<float>(iou),
                                              items<Kept>(kept_space), items<float>(boxes), items<int64_t>(anchor),
                                              items<int64_t>(count), items<int64_t>(candidates));
  check_launch("nms");
  return {boxes, count, candidates, anchor};
}

std::tuple<Tensor, Tensor> nms_boxes(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
                                     double iou, int64_t max_det) {
  check_nms_boxes(boxes, scores, labels, iou, max_det);
  check_device(scores, boxes.get_device_index(), "nms_boxes", "scores");
  if (labels) check_device(*labels, boxes.get_device_index(), "nms_boxes", "labels");
  const int64_t total = boxes.size(0);
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  Tensor index = torch::stable::new_empty(scores, {max_det}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(scores, {}, ScalarType::Long);
  Tensor key_space = words(scores, total * sizeof(uint64_t));
  Tensor kept_space = words(scores, std::min(max_det, total) * sizeof(Kept));
  const cudaStream_t stream = current_stream(boxes.get_device_index());
  const BoxSource source{static_cast<const Corners*>(boxes.const_data_ptr()),
                         labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr};
  uint64_t* keys = items<uint64_t>(key_space);
  if (total > 0) {
    key_kernel<<<static_cast<unsigned>((total + kScan - 1) / kScan), kScan, 0, stream>>>(
        static_cast<const float*>(scores.const_data_ptr()), total, keys);
  }
  greedy_boxes_kernel<<<1, kGreedy, 0, stream>>>(source, keys, total, max_det, static_cast<float>(iou),
                                                 items<Kept>(kept_space), items<int64_t>(index), items<int64_t>(count));
  check_launch("nms_boxes");
  return {index, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CUDA, library) {
  library.impl("nms", TORCH_BOX(&nms));
  library.impl("nms_boxes", TORCH_BOX(&nms_boxes));
}
