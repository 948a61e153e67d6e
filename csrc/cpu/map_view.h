// A [B, C, H, W] tensor as the CPU kernels see it: rows of channels (channels_last, dense or a channel slice) or planes
// of pixels (contiguous, dense or a channel slice), and its element types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

// Vectors wider than the registers of the build are split by the compiler; it notes that passing them to functions depends
// on the build, which inlined functions of one library do not care about.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace yolov9_fast::maps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct FeatureMap {
  void* data = nullptr;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  bool channels_last = false;
  int64_t pixel = 0;    // elements from a pixel to the next: the row stride of channels_last, else 1
  int64_t channel = 0;  // elements from a channel to the next: 1 in channels_last, else H·W
  int64_t image = 0;    // elements from an image to the next

  int64_t pixels() const { return height * width; }
  bool empty() const { return batch == 0 || channels == 0 || height == 0 || width == 0; }
  template <class T>
  T* at(int64_t n, int64_t c, int64_t p) const {
    return static_cast<T*>(data) + n * image + c * channel + p * pixel;
  }
};

// The row stride of a map in channels_last, 0 where it is none. Strides of sides of length 1 mean nothing.
inline int64_t row_stride(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  if (channels > 1 && x.stride(1) != 1) return 0;
  const int64_t row = width > 1 ? x.stride(3) : height > 1 ? x.stride(2) : batch > 1 ? x.stride(0) : channels;
  if (row < channels || (height > 1 && x.stride(2) != row * width)) return 0;
  return batch > 1 && x.stride(0) != row * width * height ? 0 : row;
}

inline bool lies_in_planes(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  return (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width) &&
         (x.size(1) == 1 || x.stride(1) == height * width);
}

inline bool prefers_channels_last(const Tensor& x) {
  if (row_stride(x) == 0) return false;
  return !lies_in_planes(x) || (x.size(1) > 1 && x.stride(1) == 1 && x.stride(3) != 1);
}

// The map of `x` in the layout asked for, by default its own; what lies otherwise is refused.
inline FeatureMap feature_map(const Tensor& x, const char* op, const char* name,
                              std::optional<bool> channels_last = std::nullopt) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be [B, C, H, W]");
  FeatureMap map;
  map.data = const_cast<void*>(x.const_data_ptr());
  map.batch = x.size(0);
  map.channels = x.size(1);
  map.height = x.size(2);
  map.width = x.size(3);
  map.channels_last = channels_last.value_or(prefers_channels_last(x));
  if (map.empty()) return map;
  if (map.channels_last) {
    map.pixel = row_stride(x);
    map.channel = 1;
    STD_TORCH_CHECK(map.pixel > 0, op, ": ", name, " must lie channels_last, dense or as a channel slice");
    map.image = map.pixel * map.pixels();
  } else {
    STD_TORCH_CHECK(lies_in_planes(x), op, ": ", name, " must lie contiguous, dense or as a channel slice");
    map.pixel = 1;
    map.channel = map.pixels();
    map.image = map.batch > 1 ? x.stride(0) : map.channel * map.channels;
  }
  return map;
}

// A new dense tensor of `like`'s dtype in the layout asked for.
inline Tensor new_map(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      bool channels_last) {
  return torch::stable::empty({batch, channels, height, width}, like.scalar_type(), torch::headeronly::Layout::Strided,
                              like.device(), false,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

// float64 is computed in float64, everything else in float32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// `Lanes` channels of a pixel as one vector of the compiler, and integers of the same width for places in a window.
template <class A, int Lanes>
struct Lane {
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Values __attribute__((vector_size(Lanes * sizeof(A))));
  typedef Integer Places __attribute__((vector_size(Lanes * sizeof(A))));
};
template <class V, class A>
inline V load_lanes(const A* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V, class A>
inline void store_lanes(A* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class Body>
void dispatch(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": float32, float64, bfloat16 or float16");
  }
}

// Reads `count` pixels from pixel `p` on of channels c .. c + Block as rows of Block values; channels beyond the map's
// last read as zero.
template <int Block, class T, class A>
void load_rows(const FeatureMap& map, int64_t n, int64_t c, int64_t p, int64_t count, A* rows) {
  const int64_t channels = std::min<int64_t>(Block, map.channels - c);
  const T* source = map.at<const T>(n, c, p);
  if (map.channels_last && channels == Block) {
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < Block; ++k) rows[i * Block + k] = static_cast<A>(source[i * map.pixel + k]);
    return;
  }
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t i = 0; i < count; ++i) rows[i * Block + k] = static_cast<A>(source[k * map.channel + i * map.pixel]);
  for (int64_t k = channels; k < Block; ++k)
    for (int64_t i = 0; i < count; ++i) rows[i * Block + k] = A(0);
}

template <int Block, class T, class A>
void store_rows(const FeatureMap& map, int64_t n, int64_t c, int64_t p, int64_t count, const A* rows) {
  const int64_t channels = std::min<int64_t>(Block, map.channels - c);
  T* target = map.at<T>(n, c, p);
  if (map.channels_last && channels == Block) {
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < Block; ++k) target[i * map.pixel + k] = static_cast<T>(rows[i * Block + k]);
    return;
  }
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t i = 0; i < count; ++i) target[k * map.channel + i * map.pixel] = static_cast<T>(rows[i * Block + k]);
}

}  // namespace yolov9_fast::maps
