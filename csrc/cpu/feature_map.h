// A [B, C, H, W] tensor as the CPU kernels read and write it, without a copy, in either layout of common/map_layout.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/map_layout.h"

namespace yolov9_fast {

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

}  // namespace yolov9_fast
