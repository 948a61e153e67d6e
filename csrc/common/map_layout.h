// The memory layout of a [B, C, H, W] tensor. channels_last: a pixel is a row of C adjacent channels, with one row stride
// for all pixels (dense or a channel slice); planes: a channel is a plane of H·W adjacent pixels, with any batch stride
// (contiguous or a channel slice). Every function says what its namesake in yolov9_fast/_layout.py says.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

#include "common/dispatch.h"

namespace yolov9_fast {

enum class Layout { kChannelsLast, kPlanes };

// Strides of sides of length 1, and of an empty map, are not read.
inline std::optional<int64_t> row_stride(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  if (x.numel() == 0) return channels;
  if (channels > 1 && x.stride(1) != 1) return std::nullopt;
  const int64_t row = width > 1 ? x.stride(3) : height > 1 ? x.stride(2) : batch > 1 ? x.stride(0) : channels;
  if (row < channels || (height > 1 && x.stride(2) != row * width)) return std::nullopt;
  if (batch > 1 && x.stride(0) != row * width * height) return std::nullopt;
  return row;
}

inline bool has_planes(const Tensor& x) {
  if (x.numel() == 0) return true;
  const int64_t height = x.size(2), width = x.size(3), pixels = height * width;
  return (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width) &&
         (x.size(1) == 1 || x.stride(1) == pixels) && (x.size(0) == 1 || x.stride(0) >= pixels * x.size(1));
}

inline bool has_layout(const Tensor& x, Layout layout) {
  return layout == Layout::kChannelsLast ? row_stride(x).has_value() : has_planes(x);
}

// The layout of a map; planes for one that has neither. Of a map that has both, strides of sides that may have length 1
// tell how it was made; one channel is contiguous.
inline Layout layout_of(const Tensor& x) {
  const bool rows =
      row_stride(x).has_value() && (!has_planes(x) || (x.size(1) > 1 && x.stride(1) == 1 && x.stride(3) != 1));
  return rows ? Layout::kChannelsLast : Layout::kPlanes;
}

inline torch::headeronly::MemoryFormat memory_format(Layout layout) {
  using torch::headeronly::MemoryFormat;
  return layout == Layout::kChannelsLast ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// An uninitialised [B, channels, height, width], dense, in the dtype and layout of `like`: what the fakes promise.
inline Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(),
                              torch::headeronly::Layout::Strided, like.device(), false,
                              memory_format(layout_of(like)));
}

inline Tensor empty_map(const Tensor& like) { return empty_map(like, like.size(1), like.size(2), like.size(3)); }

}  // namespace yolov9_fast
