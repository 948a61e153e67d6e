// Blocks of pixels of an image's row, seen through a map on a grey canvas with tiles: bilinear, as OpenCV rounds it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace yolov9_fast {

constexpr int kBlock = 64;
constexpr uint8_t kGrey = 114;

// An image on the canvas: pixel (x, y) of the canvas is at base + y * stride + 3 * x for x1 <= x < x2, y1 <= y < y2.
struct Tile {
  const uint8_t* base;
  int64_t stride;
  int x1, y1, x2, y2;

  bool covers(int left, int top, int right, int bottom) const {
    return left >= x1 && top >= y1 && right < x2 && bottom < y2;
  }
  bool touches(int left, int top, int right, int bottom) const {
    return left < x2 && top < y2 && right >= x1 && bottom >= y1;
  }
};

struct View {
  int height = 0, width = 0;
  float matrix[9];
  std::vector<Tile> tiles;
};

// Upper left of the four canvas pixels that each pixel is between, and how far it is from it.
struct Places {
  alignas(64) int32_t x[kBlock], y[kBlock];
  alignas(64) float right[kBlock], down[kBlock];
};

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Beyond any canvas a coordinate may be any other such one; a NaN becomes one too.
inline float bounded(float value) {
  value = value > -4e4f ? value : -4e4f;
  return value < 4e4f ? value : 4e4f;
}

inline int32_t floor_of(float value) {
  const int32_t whole = static_cast<int32_t>(value);
  return whole - (value < static_cast<float>(whole));
}

inline void split(Places& places) {
  for (int k = 0; k < kBlock; ++k) {
    const float x = bounded(places.right[k]), y = bounded(places.down[k]);
    places.x[k] = floor_of(x);
    places.y[k] = floor_of(y);
    places.right[k] = x - static_cast<float>(places.x[k]);
    places.down[k] = y - static_cast<float>(places.y[k]);
  }
}

inline void find_places(const float* m, bool perspective, int row, int column, Places& places) {
  const float y = static_cast<float>(row);
  const float x0 = y * m[1] + m[2], y0 = y * m[4] + m[5], w0 = y * m[7] + m[8];
  for (int k = 0; k < kBlock; ++k) {
    const float x = static_cast<float>(column + k);
    places.right[k] = multiply_add(m[0], x, x0);
    places.down[k] = multiply_add(m[3], x, y0);
  }
  if (perspective) {
    for (int k = 0; k < kBlock; ++k) {
      const float w = multiply_add(m[6], static_cast<float>(column + k), w0);
      places.right[k] /= w;
      places.down[k] /= w;
    }
  }
  split(places);
}

// The six bytes of two neighbouring pixels.
inline uint64_t pair_at(const uint8_t* pixel) {
  uint32_t first;
  uint16_t last;
  std::memcpy(&first, pixel, 4);
  std::memcpy(&last, pixel + 4, 2);
  return first | static_cast<uint64_t>(last) << 32;
}

inline uint64_t pixel_at(const View& view, int x, int y) {
  for (const Tile& tile : view.tiles) {
    if (tile.covers(x, y, x, y)) {
      const uint8_t* pixel = tile.base + y * tile.stride + 3 * int64_t{x};
      return pixel[0] | pixel[1] << 8 | pixel[2] << 16;
    }
  }
  return kGrey * 0x010101u;
}

struct Corners {
  alignas(64) uint64_t above[kBlock], below[kBlock];
};

inline void read_across(const View& view, const Places& places, int count, Corners& corners) {
  const Tile* last = view.tiles.data();
  for (int k = 0; k < count; ++k) {
    const int x = places.x[k], y = places.y[k];
    if (!last->covers(x, y, x + 1, y + 1)) {
      const Tile* found = nullptr;
      for (const Tile& tile : view.tiles) {
        if (tile.covers(x, y, x + 1, y + 1)) found = &tile;
      }
      if (found == nullptr) {
        corners.above[k] = pixel_at(view, x, y) | pixel_at(view, x + 1, y) << 24;
        corners.below[k] = pixel_at(view, x, y + 1) | pixel_at(view, x + 1, y + 1) << 24;
        continue;
      }
      last = found;
    }
    const uint8_t* pixel = last->base + y * last->stride + 3 * int64_t{x};
    corners.above[k] = pair_at(pixel);
    corners.below[k] = pair_at(pixel + last->stride);
  }
}

inline void interpolate(const Places& places, const Corners& corners, uint8_t out[3][kBlock]) {
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < kBlock; ++k) {
      const auto upper = static_cast<int32_t>(corners.above[k] >> (8 * c) & 255);
      const auto upper_right = static_cast<int32_t>(corners.above[k] >> (8 * c + 24) & 255);
      const auto lower = static_cast<int32_t>(corners.below[k] >> (8 * c) & 255);
      const auto lower_right = static_cast<int32_t>(corners.below[k] >> (8 * c + 24) & 255);
      const float above =
          multiply_add(places.right[k], static_cast<float>(upper_right - upper), static_cast<float>(upper));
      const float below =
          multiply_add(places.right[k], static_cast<float>(lower_right - lower), static_cast<float>(lower));
      // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the lowest bits.
      const float shifted = multiply_add(places.down[k], below - above, above) + 12582912.0f;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      out[c][k] = static_cast<uint8_t>(bits);
    }
  }
}

// Blue, green and red of a block of `count` pixels from (column, row); false, and nothing written, if all are grey.
inline bool read_block(const View& view, bool perspective, int row, int column, int count,
                       uint8_t out[3][kBlock]) {
  Places places;
  find_places(view.matrix, perspective, row, column, places);
  int left = places.x[0], right = left, top = places.y[0], bottom = top;
  for (int k = 0; k < count; ++k) {
    left = std::min(left, places.x[k]);
    right = std::max(right, places.x[k]);
    top = std::min(top, places.y[k]);
    bottom = std::max(bottom, places.y[k]);
  }
  const Tile* only = nullptr;
  bool touched = false;
  for (const Tile& tile : view.tiles) {
    if (!tile.touches(left, top, right + 1, bottom + 1)) continue;
    touched = true;
    if (tile.covers(left, top, right + 1, bottom + 1)) only = &tile;
  }
  if (!touched) return false;
  Corners corners;
  if (only == nullptr) {
    read_across(view, places, count, corners);
  } else if (top == bottom) {
    const uint8_t* above = only->base + top * only->stride;
    for (int k = 0; k < count; ++k) {
      corners.above[k] = pair_at(above + 3 * int64_t{places.x[k]});
      corners.below[k] = pair_at(above + only->stride + 3 * int64_t{places.x[k]});
    }
  } else {
    for (int k = 0; k < count; ++k) {
      const uint8_t* pixel = only->base + places.y[k] * only->stride + 3 * int64_t{places.x[k]};
      corners.above[k] = pair_at(pixel);
      corners.below[k] = pair_at(pixel + only->stride);
    }
  }
  for (int k = count; k < kBlock; ++k) corners.above[k] = corners.below[k] = 0;
  interpolate(places, corners, out);
  return true;
}

// addWeighted of two blocks.
inline void blend(uint8_t first[3][kBlock], const uint8_t second[3][kBlock], float share, float rest) {
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < kBlock; ++k) {
      const float sum = multiply_add(static_cast<float>(first[c][k]), share, static_cast<float>(second[c][k]) * rest);
      const float bounded_sum = std::min(std::max(sum, 0.0f), 255.0f);
      const float shifted = bounded_sum + 12582912.0f;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      first[c][k] = static_cast<uint8_t>(bits);
    }
  }
}

}  // namespace yolov9_fast
