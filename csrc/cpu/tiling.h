// The fixed division of a feature map into tiles, which does not depend on the number of threads, and the loops over
// tiles, columns and runs of values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "cpu/feature_map.h"
#include "cpu/vector.h"

namespace yolov9_fast {

// A tile is a block of rows (channels_last) or a segment of one plane. Sums over a tile go into a table
// [entries, channels]; the entries are added in their order.
//
// `fold` dense rows count as one wide row of full registers: 24 channels become 48 columns, three registers of float32.
// In the table these are `fold` adjacent entries.
struct Tiling {
  Tiling(const FeatureMap& map, bool dense, int lanes) {
    // 8192 values, 32 KB of float32, stay in the first-level cache; fewer if two threads would have little to share.
    const int64_t values = map.all_pixels() * map.channels;
    const int64_t aim = std::clamp<int64_t>(values / 8, 1024, 8192);
    channels = map.channels, rows = map.channels_last();
    if (rows) {
      if (dense) fold = folded_rows(map.all_pixels(), lanes);
      length = map.all_pixels() / fold, width = channels * fold;
      size = std::max<int64_t>(aim / std::max<int64_t>(width, 1), 8);
      segments = (length + size - 1) / size;
      tiles = segments;
      entries = segments * fold;
    } else {
      length = map.pixels(), width = channels, size = aim;
      segments = (length + size - 1) / size;
      tiles = map.batch * channels * segments;
      entries = map.batch * segments;
    }
    values_per_tile = std::max<int64_t>(1, values / std::max<int64_t>(tiles, 1));
  }

  // The tiles of a thread's smallest share.
  int64_t grain(int64_t least_values) const { return 1 + least_values / values_per_tile; }

  // The most rows that make at most 64 columns in full registers; 1 if no such number divides the count.
  int64_t folded_rows(int64_t count, int lanes) const {
    const int64_t least = lanes / std::gcd<int64_t>(channels, lanes);
    for (int64_t rows = least * 16; rows >= least; rows -= least) {
      if ((rows * channels <= 64 || rows == least) && count % rows == 0) return rows;
    }
    return 1;
  }

  int64_t begin(int64_t segment) const { return segment * size; }
  int64_t extent(int64_t segment) const { return std::min(size, length - segment * size); }
  // How many values of each channel are in entry `e`.
  int64_t values_of_entry(int64_t e) const { return extent(e / fold % segments); }

  int64_t channels, width, length, size, segments, tiles, entries, values_per_tile;
  int64_t fold = 1;
  bool rows;
};

template <int K>
using Registers = std::integral_constant<int, K>;

// Calls body(lanes, i) for the registers of a run of `length` values.
// Inlined so that captured values stay in CPU registers: GCC must otherwise assume that stores change them.
template <typename A, typename Body>
[[gnu::always_inline]] inline void over_run(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= length; i += kLanes<A>) body(AllLanes{}, i);
  if (i < length) body(FirstLanes{static_cast<int>(length - i)}, i);
}

// Calls body(lanes, registers, c) for blocks of up to four registers of a row: the factors of the block's columns stay
// in CPU registers while the body visits all rows of a tile.
template <typename A, typename Body>
[[gnu::always_inline]] inline void over_columns(int64_t width, const Body& body) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= width; c += 4 * L) body(AllLanes{}, Registers<4>{}, c);
  if (c + 3 * L <= width) {
    body(AllLanes{}, Registers<3>{}, c), c += 3 * L;
  } else if (c + 2 * L <= width) {
    body(AllLanes{}, Registers<2>{}, c), c += 2 * L;
  } else if (c + L <= width) {
    body(AllLanes{}, Registers<1>{}, c), c += L;
  }
  if (c < width) body(FirstLanes{static_cast<int>(width - c)}, Registers<1>{}, c);
}

// The fewest values for which another thread pays: in passes that compute e^x, and in passes that only read and add.
constexpr int64_t kWithExponential = 32768, kWithout = 131072;

// Calls rows_body(first row, rows, table row) or plane_body(n, c, first value, values, entry) for every tile.
template <typename RowsBody, typename PlaneBody>
void over_tiles(const Tiling& tiling, int64_t least, const RowsBody& rows_body, const PlaneBody& plane_body) {
  torch::stable::parallel_for(0, tiling.tiles, tiling.grain(least), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t segment = t % tiling.segments;
      if (tiling.rows) {
        rows_body(tiling.begin(segment), tiling.extent(segment), t * tiling.fold);
      } else {
        const int64_t plane = t / tiling.segments, n = plane / tiling.channels, c = plane % tiling.channels;
        plane_body(n, c, tiling.begin(segment), tiling.extent(segment), n * tiling.segments + segment);
      }
    }
  });
}

}  // namespace yolov9_fast
