// box_iou on the CPU: reads (N + M) x 16 bytes, writes N x M x 4; rows in parallel, columns vectorised.
#include "common/box_iou.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace {

using torch::stable::Tensor;

// A structure of arrays: the inner loop then loads full vectors.
struct Columns {
  explicit Columns(const Tensor& boxes) : count(boxes.size(0)), data(5 * count) {
    const float* source = static_cast<const float*>(boxes.const_data_ptr());
    const int64_t row = boxes.stride(0), column = boxes.stride(1);
    for (int64_t i = 0; i < count; ++i) {
      const float* box = source + i * row;
      const float x1 = box[0], y1 = box[column], x2 = box[2 * column], y2 = box[3 * column];
      at(0)[i] = x1;
      at(1)[i] = y1;
      at(2)[i] = x2;
      at(3)[i] = y2;
      at(4)[i] = yolov9_fast::box_area(x1, y1, x2, y2);
    }
  }
  float* at(int64_t column) { return data.data() + column * count; }
  const float* at(int64_t column) const { return data.data() + column * count; }

  int64_t count;
  std::vector<float> data;
};

void check(const Tensor& boxes, const char* name) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "box_iou: ", name, ": expected [n, 4]");
  STD_TORCH_CHECK(boxes.scalar_type() == torch::headeronly::ScalarType::Float, "box_iou: ", name, ": expected float32");
}

Tensor box_iou(const Tensor& a, const Tensor& b) {
  check(a, "a");
  check(b, "b");
  const Columns rows(a), columns(b);
  Tensor out = torch::stable::new_empty(a, {rows.count, columns.count});
  float* result = static_cast<float*>(out.mutable_data_ptr());
  const int64_t width = columns.count;
  const float *x1 = columns.at(0), *y1 = columns.at(1), *x2 = columns.at(2), *y2 = columns.at(3), *area = columns.at(4);
  // 32768 results, about 10 us of work, is where a second thread starts to pay.
  const int64_t grain = 1 + 32768 / (width + 1);
  torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float ax1 = rows.at(0)[i], ay1 = rows.at(1)[i], ax2 = rows.at(2)[i], ay2 = rows.at(3)[i];
      const float a_area = rows.at(4)[i];
      float* line = result + i * width;
      for (int64_t j = 0; j < width; ++j) {
        line[j] = yolov9_fast::box_iou(ax1, ay1, ax2, ay2, a_area, x1[j], y1[j], x2[j], y2[j], area[j]);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("box_iou", TORCH_BOX(&box_iou)); }
