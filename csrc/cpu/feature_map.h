// How the kernels walk over feature maps [N, C, H, W]: rows of channels (channels_last) or planes (NCHW), and slices of
// either along the channels; and the fixed division into tiles, which no number of threads changes.
#pragma once

#include "cpu/vector.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>

namespace yolov9_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements from one pixel to the next where channels lie side by side and all pixels at one distance; -1 otherwise.
inline int64_t row_stride(const Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) return -1;
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  const int64_t row = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : x.size(1);
  const bool even = row >= x.size(1) && (h <= 1 || x.stride(2) == w * row) && (n <= 1 || x.stride(0) == h * w * row);
  return even ? row : -1;
}

inline bool has_dense_planes(const Tensor& x) {
  return (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(3));
}

// The layout in which a call runs: that of its first tensor; a tensor in neither is copied to planes.
struct FeatureMap {
  explicit FeatureMap(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "expected a feature map [N, C, H, W], got ", x.dim(), " dimensions");
    batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
    pixels = height * width;
    rows = row_stride(x) >= 0;
  }

  int64_t count() const { return batch * pixels; }
  MemoryFormat format() const { return rows ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }
  bool fits(const Tensor& x) const { return rows ? row_stride(x) >= 0 : has_dense_planes(x); }
  bool same_shape(const Tensor& x) const {
    return x.dim() == 4 && x.size(0) == batch && x.size(1) == channels && x.size(2) == height && x.size(3) == width;
  }

  Tensor readable(const Tensor& x) const { return fits(x) ? x : torch::stable::contiguous(x, format()); }
  Tensor empty_like(const Tensor& x) const {
    const std::array<int64_t, 4> sizes{batch, channels, height, width};
    return torch::stable::empty({sizes.data(), 4}, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt, format());
  }

  int64_t batch, channels, height, width, pixels;
  bool rows;
};

// Where a tensor's values lie: row r at data + r * row, or plane (n, c) at data + n * batch + c * channel.
template <typename T>
struct Access {
  Access() = default;
  Access(const FeatureMap& map, const Tensor& x, T* values) : data(values) {
    if (map.rows) {
      row = row_stride(x);
    } else {
      batch = x.stride(0), channel = x.stride(1);
    }
  }
  T* plane(int64_t n, int64_t c) const { return data + n * batch + c * channel; }

  T* data = nullptr;
  int64_t row = 0, batch = 0, channel = 0;
};

template <typename T>
Access<const T> reading(const FeatureMap& map, const Tensor& x) {
  return {map, x, static_cast<const T*>(x.const_data_ptr())};
}

template <typename T>
Access<T> writing(const FeatureMap& map, const Tensor& x) {
  return {map, x, static_cast<T*>(x.mutable_data_ptr())};
}

// Rows: blocks of whole rows. Planes: segments of one plane. Sums over a tile go into a table [entries, channels]; the
// entries are added up in their order.
//
// Where rows lie dense, `fold` of them count as one wide row of whole registers: 24 channels become 48 columns, three
// registers of float32. In the table that is `fold` entries side by side.
struct Tiling {
  Tiling(const FeatureMap& map, bool dense, int lanes) {
    // 8192 values, 32 KB of float32, stay in a core's first cache; less where two threads would have little to share.
    const int64_t values = map.count() * map.channels;
    const int64_t aim = std::clamp<int64_t>(values / 8, 1024, 8192);
    channels = map.channels, rows = map.rows;
    if (rows) {
      if (dense) fold = folded_rows(map.count(), lanes);
      length = map.count() / fold, width = channels * fold;
      size = std::max<int64_t>(aim / std::max<int64_t>(width, 1), 8);
      segments = (length + size - 1) / size;
      tiles = segments;
      entries = segments * fold;
    } else {
      length = map.pixels, width = channels, size = aim;
      segments = (length + size - 1) / size;
      tiles = map.batch * channels * segments;
      entries = map.batch * segments;
    }
    values_per_tile = std::max<int64_t>(1, values / std::max<int64_t>(tiles, 1));
  }

  // Tiles that make up the least share of a thread.
  int64_t grain(int64_t least_values) const { return 1 + least_values / values_per_tile; }

  // The most rows that make at most 64 columns in whole registers; 1 where none divide the count.
  int64_t folded_rows(int64_t count, int lanes) const {
    const int64_t least = lanes / std::gcd<int64_t>(channels, lanes);
    for (int64_t rows = least * 16; rows >= least; rows -= least) {
      if ((rows * channels <= 64 || rows == least) && count % rows == 0) return rows;
    }
    return 1;
  }

  int64_t begin(int64_t segment) const { return segment * size; }
  int64_t extent(int64_t segment) const { return std::min(size, length - segment * size); }
  // How many values of each channel entry `e` sums up.
  int64_t values_of_entry(int64_t e) const { return extent(e / fold % segments); }

  int64_t channels, width, length, size, segments, tiles, entries, values_per_tile;
  int64_t fold = 1;
  bool rows;
};

}  // namespace yolov9_fast
