// assign on the GPU: the four launches of common/assign_block.h. Of the boxes and scores it reads only the
// anchors inside a ground truth, 4 to 36 bytes each; it writes 12 bytes per anchor, never waits for the host, and
// allocates O(A + B·N) next to its outputs.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <utility>

#include "common/assign_arguments.h"
#include "cuda/stream.cuh"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::tal;

// Four chunks of anchors at a time: a ground truth of median size needs two or three rounds.
constexpr int kThreads = 128;
// Contested anchors are neighbours: small blocks spread them.
constexpr int kResolveThreads = 64;
// Resident blocks that ptxas has to allow. Without a number it aims at 21, with 48 registers, and spills.
constexpr int kResolveBlocks = 16;

template <class Score>
__global__ void prepare_kernel(Problem<Score> p) {
  prepare(p, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

template <class Score>
__global__ void __launch_bounds__(kThreads) claim_kernel(Problem<Score> p) {
  __shared__ ClaimShared shared;
  claim(DeviceBlock{}, shared, p, blockIdx.x);
}

template <class Score>
__global__ void __launch_bounds__(kResolveThreads, kResolveBlocks) resolve_kernel(Problem<Score> p) {
  __shared__ ResolveShared shared;
  resolve(DeviceBlock{}, shared, p, static_cast<int64_t>(blockIdx.x) * kResolveThreads);
}

template <class Score>
__global__ void weigh_kernel(Problem<Score> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.batch * p.anchors) weigh(p, i);
}

unsigned blocks(int64_t items, int threads) { return static_cast<unsigned>((items + threads - 1) / threads); }

std::tuple<Tensor, Tensor> assign(const Tensor& scores, const Tensor& boxes, const Tensor& points, const Tensor& labels,
                                  const Tensor& gt_boxes, const Tensor& mask, const std::optional<Tensor>& sizes,
                                  int64_t topk, double alpha, double beta, int64_t rule) {
  const int32_t device = boxes.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments given(scores, boxes, points, labels, gt_boxes, mask, sizes, topk, alpha, beta, rule);
  const std::pair<const Tensor*, const char*> others[] = {{&scores, "scores"},
                                                          {&points, "anchor_points"},
                                                          {&labels, "gt_labels"},
                                                          {&gt_boxes, "gt_boxes"},
                                                          {&mask, "gt_mask"}};
  for (const auto& [tensor, name] : others) check_device(*tensor, device, kOp, name);
  if (sizes.has_value()) check_device(*sizes, device, kOp, "sizes");
  if (given.nothing_to_do()) return given.all_background();
  const int64_t all = boxes.size(0) * boxes.size(1), rows = boxes.size(0) * gt_boxes.size(1);
  STD_TORCH_CHECK(all < INT32_MAX && rows < INT32_MAX, kOp,
                  ": boxes, gt_boxes: expected fewer than 2^31 anchors and ground truths in the batch");
  const int64_t chunks = (boxes.size(1) + kChunk - 1) / kChunk;
  const Tensor boxes_of_chunks = torch::stable::new_empty(boxes, {4 * chunks});
  const Tensor best = torch::stable::new_empty(boxes, {2 * rows}, ScalarType::Int);
  const cudaStream_t stream = current_stream(device);
  dispatch(given.scores.scalar_type(), kOp, "scores", [&](auto score) {
    auto p = given.problem<decltype(score)>();
    p.chunks = static_cast<float*>(boxes_of_chunks.mutable_data_ptr());
    p.best_metric = static_cast<uint32_t*>(best.mutable_data_ptr());
    p.best_overlap = p.best_metric + rows;
    prepare_kernel<<<blocks(std::max({chunks, all, rows}), kThreads), kThreads, 0, stream>>>(p);
    claim_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p);
    resolve_kernel<<<blocks(all, kResolveThreads), kResolveThreads, 0, stream>>>(p);
    weigh_kernel<<<blocks(all, kThreads), kThreads, 0, stream>>>(p);
  });
  yolov9_fast::check_launch("assign");
  return {given.gt_index, given.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CUDA, library) { library.impl("assign", TORCH_BOX(&assign)); }
