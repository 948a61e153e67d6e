// decode on the GPU: one launch of common/decode_block.h, a block per tile of 64 anchors. At batch 32, 640 px, 80
// classes in bfloat16 it reads 77 MB and writes 90 MB; for the assignment it reads 34 MB and the logits of the wanted
// classes.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/decode_arguments.h"
#include "common/decode_block.h"
#include "cuda/stream.cuh"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::decoding;

constexpr int kThreads = 256;  // a thread for each side of a tile's anchors

template <class T, class Real>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Problem<T, Real> p) {
  __shared__ Shared<Real> shared;
  decode_block(DeviceBlock{}, shared, p, blockIdx.x);
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads, 1) assignment_kernel(const __grid_constant__ Problem<T, Real> p) {
  __shared__ Shared<Real> shared;
  assignment_block(DeviceBlock{}, shared, p, blockIdx.x);
}

int32_t device_of(const std::vector<Tensor>& maps) {
  STD_TORCH_CHECK(!maps.empty(), kOp, ": maps: expected at least one, got none");
  for (const Tensor& map : maps) check_device(map, maps[0].get_device_index(), kOp, "maps");
  return maps[0].get_device_index();
}

template <class T, class Real>
unsigned blocks_of(const Problem<T, Real>& p) {
  STD_TORCH_CHECK(p.blocks() < INT32_MAX, kOp, ": the batch is too large");
  return static_cast<unsigned>(p.blocks());
}

Tensor decode_forward(const std::vector<Tensor>& maps, const std::vector<int64_t>& strides) {
  const int32_t device = device_of(maps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    Problem<T, Real> p{};
    p.maps = raw_maps<T>(maps, {}, strides, kOp);
    out = decoded<T, Real>(maps, p.maps);
    p.out = data_of<Real>(out);
    const unsigned blocks = blocks_of(p);
    if (blocks > 0) decode_kernel<T, Real><<<blocks, kThreads, 0, current_stream(device)>>>(p);
    check_launch(kOp);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> decode_for_assignment(const std::vector<Tensor>& maps,
                                                         const std::optional<Tensor>& labels,
                                                         const std::vector<int64_t>& strides) {
  const int32_t device = device_of(maps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (labels.has_value()) check_device(*labels, device, kOp, "labels");
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    Problem<T, Real> p{};
    p.maps = raw_maps<T>(maps, {}, strides, kOp);
    const ForAssignment<Real> wanted(maps, p.maps, labels);
    p.scores = data_of<Real>(wanted.scores);
    p.boxes = data_of<Real>(wanted.boxes);
    p.points = data_of<Real>(wanted.points);
    p.labels = wanted.labels;
    p.rows = wanted.rows;
    const unsigned blocks = blocks_of(p);
    if (blocks > 0) assignment_kernel<T, Real><<<blocks, kThreads, 0, current_stream(device)>>>(p);
    check_launch(kOp);
    results = wanted.results();
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CUDA, library) {
  library.impl("decode_forward", TORCH_BOX(&decode_forward));
  library.impl("decode_for_assignment", TORCH_BOX(&decode_for_assignment));
}
