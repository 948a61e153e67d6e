// Blocks of channels for the pooling kernels: kBlock channels of each pixel as one row, in either layout of the map.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/feature_map.h"
#include "cpu/vector.h"

// Vectors wider than the registers of the build are split by the compiler; its note that passing them to functions
// depends on the build does not matter for the inlined functions of one library.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace yolov9_fast {

constexpr int kBlock = 16;

// kBlock channels of a pixel as one vector of the compiler, and integers of the same width for positions in a window.
template <class A>
struct Block {
  using Position = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Values __attribute__((vector_size(kBlock * sizeof(A))));
  typedef Position Positions __attribute__((vector_size(kBlock * sizeof(A))));
};

template <class V, class A>
V load_block(const A* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class A>
void store_block(A* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// Reads pixels p .. p + count of channels c .. c + kBlock as rows; channels after the last read as zero.
template <class T, class A>
void load_rows(const FeatureMap& map, int64_t n, int64_t c, int64_t p, int64_t count, A* rows) {
  const int64_t channels = std::min<int64_t>(kBlock, map.channels - c);
  const T* source = map.at<const T>(n, c, p);
  if (map.channels_last() && channels == kBlock) {
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < kBlock; k += kLanes<A>)
        store(rows + i * kBlock + k, load(source + i * map.pixel + k, AllLanes{}), AllLanes{});
    }
    return;
  }
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t i = 0; i < count; ++i) rows[i * kBlock + k] = static_cast<A>(source[k * map.channel + i * map.pixel]);
  }
  for (int64_t k = channels; k < kBlock; ++k) {
    for (int64_t i = 0; i < count; ++i) rows[i * kBlock + k] = A(0);
  }
}

template <class T, class A>
void store_rows(const FeatureMap& map, int64_t n, int64_t c, int64_t p, int64_t count, const A* rows) {
  const int64_t channels = std::min<int64_t>(kBlock, map.channels - c);
  T* target = map.at<T>(n, c, p);
  if (map.channels_last() && channels == kBlock) {
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < kBlock; k += kLanes<A>)
        store(target + i * map.pixel + k, load(rows + i * kBlock + k, AllLanes{}), AllLanes{});
    }
    return;
  }
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t i = 0; i < count; ++i) target[k * map.channel + i * map.pixel] = static_cast<T>(rows[i * kBlock + k]);
  }
}

// A thread's blocks, numbered over all images.
struct Share {
  int64_t begin, end, per_image;

  int64_t image(int64_t block) const { return block / per_image; }
  int64_t channel(int64_t block) const { return block % per_image * kBlock; }
};

// Calls body(share) for every thread's share of the blocks of all images.
template <class Body>
void over_blocks(const FeatureMap& x, const Body& body) {
  const int64_t per_image = (x.channels + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, x.batch * per_image, 1,
                              [&](int64_t begin, int64_t end) { body(Share{begin, end, per_image}); });
}

}  // namespace yolov9_fast
