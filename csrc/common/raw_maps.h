// The raw maps [B, 64 + nc, H, W] of a head's levels where they lie: planes of pixels, rows of channels, or slices of
// either; and the same for the gradients written beside them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace yolov9_fast {

constexpr int kMaxLevels = 8;

// Element (image b, channel c, pixel p) lies at b * image + c * channel + p * pixel.
struct MapStrides {
  int64_t image = 0, channel = 0, pixel = 0;
};

template <class T>
struct Level {
  const T* data = nullptr;
  T* gradient = nullptr;  // null where none is asked for
  MapStrides at, gradient_at;
  int64_t width = 0, pixels = 0, first_anchor = 0;
  int64_t stride = 0;  // pixels of the input per cell
};

// By value into a GPU kernel, so of fixed size.
template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count = 0;
  int64_t batch = 0, channels = 0, anchors = 0;
};

inline MapStrides map_strides(const torch::stable::Tensor& map, const char* op) {
  const int64_t height = map.size(2), width = map.size(3);
  const int64_t pixel = width > 1 ? map.stride(3) : height > 1 ? map.stride(2) : 1;
  STD_TORCH_CHECK(height <= 1 || width <= 1 || map.stride(2) == width * pixel, op,
                  ": the rows of a map must follow each other without gaps");
  return {map.stride(0), map.stride(1), pixel};
}

// `gradients`: none, or one per map of the same shape and dtype.
template <class T>
Levels<T> raw_maps(const std::vector<torch::stable::Tensor>& maps, const std::vector<torch::stable::Tensor>& gradients,
                   const std::vector<int64_t>& strides, const char* op) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels && maps.size() == strides.size(), op,
                  ": expected 1 to 8 maps, one per stride");
  STD_TORCH_CHECK(gradients.empty() || gradients.size() == maps.size(), op, ": expected one gradient per map");
  Levels<T> result;
  result.count = static_cast<int>(maps.size());
  for (int i = 0; i < result.count; ++i) {
    const torch::stable::Tensor& map = maps[i];
    STD_TORCH_CHECK(map.dim() == 4 && map.size(1) > 64, op, ": maps must be [B, 64 + nc, H, W]");
    STD_TORCH_CHECK(map.scalar_type() == maps[0].scalar_type(), op, ": maps must be of one dtype");
    if (i == 0) {
      result.batch = map.size(0);
      result.channels = map.size(1);
    }
    STD_TORCH_CHECK(map.size(0) == result.batch && map.size(1) == result.channels, op, ": maps do not fit each other");
    Level<T>& level = result.level[i];
    level.data = static_cast<const T*>(map.const_data_ptr());
    level.at = map_strides(map, op);
    if (!gradients.empty()) {
      const torch::stable::Tensor& gradient = gradients[i];
      STD_TORCH_CHECK(gradient.dim() == 4 && gradient.scalar_type() == map.scalar_type(), op,
                      ": a gradient must be of its map's shape and dtype");
      for (int64_t d = 0; d < 4; ++d) {
        STD_TORCH_CHECK(gradient.size(d) == map.size(d), op, ": a gradient must be of its map's shape and dtype");
      }
      level.gradient = static_cast<T*>(gradient.mutable_data_ptr());
      level.gradient_at = map_strides(gradient, op);
    }
    level.width = map.size(3);
    level.pixels = map.size(2) * map.size(3);
    level.first_anchor = result.anchors;
    level.stride = strides[i];
    result.anchors += level.pixels;
  }
  return result;
}

}  // namespace yolov9_fast
