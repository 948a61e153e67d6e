// box_iou on the GPU: reads (N + M) x 16 bytes, writes N x M x 4. One thread per result, columns along x so that a
// warp writes 128 consecutive bytes; rows along y, in a loop because a grid's y is limited to 65535.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "common/box_iou.h"
#include "cuda/stream.cuh"

namespace {

using torch::stable::Tensor;

struct Boxes {
  const float* data;
  int64_t row, column;
};

constexpr int kThreads = 128;
constexpr int64_t kMaxRowsOfGrid = 65535;

__global__ void box_iou_kernel(Boxes a, Boxes b, int64_t rows, int64_t columns, float* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= columns) return;
  const float* right = b.data + j * b.row;
  const float bx1 = right[0], by1 = right[b.column], bx2 = right[2 * b.column], by2 = right[3 * b.column];
  const float b_area = yolov9_fast::box_area(bx1, by1, bx2, by2);
  for (int64_t i = blockIdx.y; i < rows; i += gridDim.y) {
    const float* left = a.data + i * a.row;
    const float ax1 = left[0], ay1 = left[a.column], ax2 = left[2 * a.column], ay2 = left[3 * a.column];
    const float a_area = yolov9_fast::box_area(ax1, ay1, ax2, ay2);
    out[i * columns + j] = yolov9_fast::box_iou(ax1, ay1, ax2, ay2, a_area, bx1, by1, bx2, by2, b_area);
  }
}

Boxes view(const Tensor& boxes, const char* name) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "box_iou: ", name, ": expected [n, 4]");
  STD_TORCH_CHECK(boxes.scalar_type() == torch::headeronly::ScalarType::Float, "box_iou: ", name, ": expected float32");
  return {static_cast<const float*>(boxes.const_data_ptr()), boxes.stride(0), boxes.stride(1)};
}

Tensor box_iou(const Tensor& a, const Tensor& b) {
  const Boxes left = view(a, "a"), right = view(b, "b");
  yolov9_fast::check_device(b, a.get_device_index(), "box_iou", "b");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const int64_t rows = a.size(0), columns = b.size(0);
  Tensor out = torch::stable::new_empty(a, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min(rows, kMaxRowsOfGrid)));
  box_iou_kernel<<<grid, kThreads, 0, yolov9_fast::current_stream(a.get_device_index())>>>(
      left, right, rows, columns, static_cast<float*>(out.mutable_data_ptr()));
  yolov9_fast::check_launch("box_iou");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CUDA, library) { library.impl("box_iou", TORCH_BOX(&box_iou)); }
