// Views of the raw maps [B, 64 + nc, H, W] of a head's levels, and of their gradients: contiguous, channels_last or a
// slice of one, as long as all pixels of an image have one distance.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dispatch.h"

namespace yolov9_fast {

constexpr int kMaxLevels = 8;

// Element (image b, channel c, pixel p) is at b * image + c * channel + p * pixel.
struct MapStrides {
  int64_t image = 0, channel = 0, pixel = 0;
};

template <class T>
struct Level {
  const T* data = nullptr;
  T* gradient = nullptr;  // null if not asked for
  MapStrides at, gradient_at;
  int64_t width = 0, pixels = 0, first_anchor = 0;
  int64_t stride = 0;  // pixels of the input per cell
};

// Of fixed size: it is passed to GPU kernels by value.
template <class T>
struct Levels {
  Level<T> level[kMaxLevels];
  int count = 0;
  int64_t batch = 0, channels = 0, anchors = 0;
};

inline MapStrides map_strides(const Tensor& map, const char* op) {
  const int64_t height = map.size(2), width = map.size(3);
  const int64_t pixel = width > 1 ? map.stride(3) : height > 1 ? map.stride(2) : 1;
  // An empty tensor is contiguous whatever its strides: no copy mends them.
  STD_TORCH_CHECK(map.numel() == 0 || height <= 1 || width <= 1 || map.stride(2) == width * pixel, op,
                  ": maps: expected adjacent rows of pixels, got a gap between rows");
  return {map.stride(0), map.stride(1), pixel};
}

// `gradients`: none, or one per map of its shape and dtype.
template <class T>
Levels<T> raw_maps(const std::vector<Tensor>& maps, const std::vector<Tensor>& gradients,
                   const std::vector<int64_t>& strides, const char* op) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels && maps.size() == strides.size(), op,
                  ": maps: expected 1 to 8, one per stride, got ", maps.size());
  STD_TORCH_CHECK(gradients.empty() || gradients.size() == maps.size(), op, ": gradients: expected one per map, got ",
                  gradients.size());
  Levels<T> result;
  result.count = static_cast<int>(maps.size());
  for (int i = 0; i < result.count; ++i) {
    const Tensor& map = maps[i];
    STD_TORCH_CHECK(map.dim() == 4 && map.size(1) > 64, op, ": maps: expected [B, 64 + nc, H, W]");
    STD_TORCH_CHECK(map.scalar_type() == maps[0].scalar_type(), op, ": maps: expected one dtype");
    if (i == 0) {
      result.batch = map.size(0);
      result.channels = map.size(1);
    }
    STD_TORCH_CHECK(map.size(0) == result.batch && map.size(1) == result.channels, op,
                    ": maps: expected one batch size and one number of channels");
    Level<T>& level = result.level[i];
    level.data = static_cast<const T*>(map.const_data_ptr());
    level.at = map_strides(map, op);
    if (!gradients.empty()) {
      const Tensor& gradient = gradients[i];
      bool fits = gradient.dim() == 4 && gradient.scalar_type() == map.scalar_type();
      for (int64_t d = 0; fits && d < 4; ++d) fits = gradient.size(d) == map.size(d);
      STD_TORCH_CHECK(fits, op, ": gradients: expected the shape and dtype of their maps");
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

// Calls body(T{}, Real{}) for the dtype of the maps and the type in which they are computed.
template <class Body>
void dispatch_maps(const std::vector<Tensor>& maps, const char* op, const Body& body) {
  STD_TORCH_CHECK(!maps.empty(), op, ": maps: expected at least one, got none");
  dispatch(maps[0].scalar_type(), op, "maps", [&](auto element) { body(element, Compute<decltype(element)>{}); });
}

}  // namespace yolov9_fast
