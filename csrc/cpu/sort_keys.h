// Sorts 64-bit keys in descending order: few by comparisons, many by a radix sort from the lowest byte.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace yolov9_fast {

inline void sort_keys(uint64_t* keys, int64_t count, std::vector<uint64_t>& scratch) {
  // Where eight passes over the keys, most of them skipped, beat count · log(count) comparisons.
  constexpr int64_t kRadix = 1024;
  if (count < kRadix) {
    std::sort(keys, keys + count, std::greater<>());
    return;
  }
  scratch.resize(count);
  uint64_t ones = keys[0], zeros = ~keys[0];
  for (int64_t i = 1; i < count; ++i) {
    ones |= keys[i];
    zeros |= ~keys[i];
  }
  const uint64_t differing = ones & zeros;
  uint64_t *from = keys, *to = scratch.data();
  for (int shift = 0; shift < 64; shift += 8) {
    if ((differing >> shift & 0xFF) == 0) continue;
    int64_t start[256] = {};
    for (int64_t i = 0; i < count; ++i) ++start[255 - (from[i] >> shift & 0xFF)];
    int64_t sum = 0;
    for (int64_t& entry : start) {
      const int64_t size = entry;
      entry = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) to[start[255 - (from[i] >> shift & 0xFF)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys) std::copy(from, from + count, keys);
}

}  // namespace yolov9_fast
