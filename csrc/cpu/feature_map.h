// The memory layout of a [B, C, H, W] tensor, in the two forms that the CPU kernels read without a copy:
// channels_last: a pixel is a row of C adjacent channels, with one row stride for all pixels (dense or a channel
// slice); planes: a channel is a plane of H·W adjacent pixels, with any batch stride (contiguous or a channel slice).
// The same convention as in yolov9_fast/_layout.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/dispatch.h"

namespace yolov9_fast {

enum class Layout { kChannelsLast, kPlanes };

// The strides of sides of length 1 are never read.
inline std::optional<int64_t> row_stride(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  if (channels > 1 && x.stride(1) != 1) return std::nullopt;
  const int64_t row = width > 1 ? x.stride(3) : height > 1 ? x.stride(2) : batch > 1 ? x.stride(0) : channels;
  if (row < channels || (height > 1 && x.stride(2) != row * width)) return std::nullopt;
  if (batch > 1 && x.stride(0) != row * width * height) return std::nullopt;
  return row;
}

inline bool has_planes(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3), pixels = height * width;
  return (width <= 1 || x.stride(3) == 1) && (height <= 1 || x.stride(2) == width) &&
         (x.size(1) <= 1 || x.stride(1) == pixels) && (x.size(0) <= 1 || x.stride(0) >= pixels * x.size(1));
}

inline bool has_layout(const Tensor& x, Layout layout) {
  return layout == Layout::kChannelsLast ? row_stride(x).has_value() : has_planes(x);
}

// The layout of a tensor; planes for one that has neither. With one channel or one pixel it may have both: then the
// strides tell how it was made.
inline Layout layout_of(const Tensor& x) {
  const bool rows =
      row_stride(x).has_value() && (!has_planes(x) || (x.size(1) > 1 && x.stride(1) == 1 && x.stride(3) != 1));
  return rows ? Layout::kChannelsLast : Layout::kPlanes;
}

// The layout that all tensors have: that of the first where they do, or the other, as one channel or one pixel has both.
inline Layout common_layout(const std::vector<Tensor>& tensors) {
  const Layout own = layout_of(tensors.front());
  const Layout other = own == Layout::kPlanes ? Layout::kChannelsLast : Layout::kPlanes;
  const auto all_have = [&](Layout layout) {
    return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& x) { return has_layout(x, layout); });
  };
  return !all_have(own) && all_have(other) ? other : own;
}

// Element (n, c, p) of a tensor is at data + n * image + c * channel + p * pixel, where p = y * width + x.
struct FeatureMap {
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  Layout layout = Layout::kPlanes;
  void* data = nullptr;
  int64_t image = 0, channel = 0, pixel = 0;

  bool channels_last() const { return layout == Layout::kChannelsLast; }
  int64_t pixels() const { return height * width; }
  int64_t all_pixels() const { return batch * pixels(); }
  bool empty() const { return batch == 0 || channels == 0 || height == 0 || width == 0; }
  bool same_pixels(const FeatureMap& other) const {
    return batch == other.batch && height == other.height && width == other.width;
  }
  bool same_shape(const FeatureMap& other) const { return channels == other.channels && same_pixels(other); }

  template <class T>
  T* at(int64_t n, int64_t c, int64_t p) const {
    return static_cast<T*>(data) + n * image + c * channel + p * pixel;
  }
};

// The view of `x`, by default in its own layout; an error if `x` has another one.
inline FeatureMap feature_map(const Tensor& x, const char* op, const char* name,
                              std::optional<Layout> layout = std::nullopt) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, ": expected [B, C, H, W], got ", x.dim(), " dimensions");
  FeatureMap map{
      x.size(0), x.size(1), x.size(2), x.size(3), layout.value_or(layout_of(x)), const_cast<void*>(x.const_data_ptr())};
  if (map.empty()) return map;
  STD_TORCH_CHECK(has_layout(x, map.layout), op, ": ", name, ": expected ",
                  map.channels_last() ? "channels_last" : "contiguous", " or a channel slice of it, got other strides");
  if (map.channels_last()) {
    map.pixel = *row_stride(x);
    map.channel = 1;
    map.image = map.pixel * map.pixels();
  } else {
    map.pixel = 1;
    map.channel = map.pixels();
    map.image = map.batch > 1 ? x.stride(0) : map.channel * map.channels;
  }
  return map;
}

inline torch::headeronly::MemoryFormat memory_format(Layout layout) {
  using torch::headeronly::MemoryFormat;
  return layout == Layout::kChannelsLast ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// A new dense tensor of the dtype of `like`.
inline Tensor new_map(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      Layout layout) {
  return torch::stable::empty({batch, channels, height, width}, like.scalar_type(), torch::headeronly::Layout::Strided,
                              like.device(), false, memory_format(layout));
}

}  // namespace yolov9_fast
