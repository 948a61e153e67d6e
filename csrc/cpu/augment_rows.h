// Blocks of pixels of an image's row, seen through a map on a grey canvas with tiles: bilinear, as OpenCV rounds it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

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
  const uint8_t* end = nullptr;  // of the memory that all images are in
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

// To the nearest integer, below 2^22: adding 1.5 * 2^23 leaves it in the lowest bits.
inline int32_t rounded(float value) {
  const float shifted = value + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
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

inline uint64_t pixel_at(const View& view, int x, int y) {
  for (const Tile& tile : view.tiles) {
    if (tile.covers(x, y, x, y)) {
      const uint8_t* pixel = tile.base + y * tile.stride + 3 * int64_t{x};
      return pixel[0] | pixel[1] << 8 | pixel[2] << 16;
    }
  }
  return kGrey * 0x010101u;
}

// The six bytes of two neighbouring pixels, in the upper and in the lower row; two more bytes may be anything.
struct Corners {
  alignas(64) uint64_t above[kBlock], below[kBlock];
};

// Of pixels that may be near the end of memory.
inline uint64_t pair_at(const uint8_t* pixel) {
  uint32_t first;
  uint16_t last;
  std::memcpy(&first, pixel, 4);
  std::memcpy(&last, pixel + 4, 2);
  return first | static_cast<uint64_t>(last) << 32;
}

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

inline void read_inside(const Tile& tile, const Places& places, int count, Corners& corners) {
  for (int k = 0; k < count; ++k) {
    const uint8_t* pixel = tile.base + places.y[k] * tile.stride + 3 * int64_t{places.x[k]};
    std::memcpy(&corners.above[k], pixel, 8);
    std::memcpy(&corners.below[k], pixel + tile.stride, 8);
  }
}

#if defined(__AVX512VBMI__)
// Bytes of 128 at the places of `index`, as floats.
inline __m512 bytes_at(__m512i first, __m512i last, __m512i index) {
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_permutex2var_epi8(0x1111111111111111, first, index, last));
}

// 16 pixels, whose places in 128 bytes of the upper and of the lower row are `index`.
inline void interpolate(const __m512i above[2], const __m512i below[2], __m512i index, __m512 right, __m512 down,
                        int k, uint8_t out[3][kBlock]) {
  for (int c = 0; c < 3; ++c) {
    const __m512i near = _mm512_add_epi32(index, _mm512_set1_epi32(c)), far = _mm512_add_epi32(near, _mm512_set1_epi32(3));
    const __m512 upper = bytes_at(above[0], above[1], near), lower = bytes_at(below[0], below[1], near);
    const __m512 first = _mm512_fmadd_ps(right, bytes_at(above[0], above[1], far) - upper, upper);
    const __m512 last = _mm512_fmadd_ps(right, bytes_at(below[0], below[1], far) - lower, lower);
    const __m512i level = _mm512_maskz_cvtps_epi32(0xffff, _mm512_fmadd_ps(down, last - first, first));
    _mm_store_si128(reinterpret_cast<__m128i*>(out[c] + k), _mm512_maskz_cvtepi32_epi8(0xffff, level));
  }
}

// A block whose corners lie in two rows, less than 128 bytes apart for every 16 pixels; false if they do not.
inline bool interpolate_rows(const uint8_t* above, int64_t stride, const uint8_t* end, const Places& places, int count,
                             uint8_t out[3][kBlock]) {
  for (int k = 0; k < count; k += 16) {
    const __m512i x = _mm512_load_si512(places.x + k);
    const int least = std::min(places.x[k], places.x[std::min(k + 15, count - 1)]);
    const int most = std::max(places.x[k], places.x[std::min(k + 15, count - 1)]);
    const uint8_t* upper = above + 3 * int64_t{least};
    if (3 * (most - least) + 6 > 128 || upper + stride + 128 > end) return false;
    const __m512i from = x - _mm512_set1_epi32(least), index = from + from + from;
    const __m512i first[2] = {_mm512_loadu_si512(upper), _mm512_loadu_si512(upper + 64)};
    const __m512i last[2] = {_mm512_loadu_si512(upper + stride), _mm512_loadu_si512(upper + stride + 64)};
    interpolate(first, last, index, _mm512_load_ps(places.right + k), _mm512_load_ps(places.down + k), k, out);
  }
  return true;
}

inline void interpolate(const Places& places, const Corners& corners, uint8_t out[3][kBlock]) {
  const __m512i eighths = _mm512_set_epi32(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0);
  for (int k = 0; k < kBlock; k += 16) {
    const __m512i above[2] = {_mm512_load_si512(corners.above + k), _mm512_load_si512(corners.above + k + 8)};
    const __m512i below[2] = {_mm512_load_si512(corners.below + k), _mm512_load_si512(corners.below + k + 8)};
    interpolate(above, below, eighths, _mm512_load_ps(places.right + k), _mm512_load_ps(places.down + k), k, out);
  }
}
#else
inline bool interpolate_rows(const uint8_t*, int64_t, const uint8_t*, const Places&, int, uint8_t[3][kBlock]) {
  return false;
}

inline void interpolate(const Places& places, const Corners& corners, uint8_t out[3][kBlock]) {
  alignas(64) uint32_t above[2][kBlock], below[2][kBlock];
  for (int k = 0; k < kBlock; ++k) {
    above[0][k] = static_cast<uint32_t>(corners.above[k]);
    above[1][k] = static_cast<uint32_t>(corners.above[k] >> 24);
    below[0][k] = static_cast<uint32_t>(corners.below[k]);
    below[1][k] = static_cast<uint32_t>(corners.below[k] >> 24);
  }
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < kBlock; ++k) {
      const auto level = [&](const uint32_t* pixels) {
        return static_cast<float>(static_cast<int32_t>(pixels[k] >> (8 * c) & 255));
      };
      const float upper = level(above[0]), lower = level(below[0]);
      const float first = multiply_add(places.right[k], level(above[1]) - upper, upper);
      const float last = multiply_add(places.right[k], level(below[1]) - lower, lower);
      out[c][k] = static_cast<uint8_t>(rounded(multiply_add(places.down[k], last - first, first)));
    }
  }
}
#endif

// Blue, green and red of a block of `count` pixels from (column, row); false, and nothing written, if all are grey.
inline bool read_block(const View& view, bool perspective, int row, int column, int count, uint8_t out[3][kBlock]) {
  Places places;
  find_places(view.matrix, perspective, row, column, places);
  // Rounding keeps the order of coordinates, so that without perspective the ends of a block are its bounds.
  const int ends = perspective ? count : 1, end = count - 1;
  int left = std::min(places.x[0], places.x[end]), right = std::max(places.x[0], places.x[end]);
  int top = std::min(places.y[0], places.y[end]), bottom = std::max(places.y[0], places.y[end]);
  for (int k = 1; k < ends; ++k) {
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
  if (only != nullptr && top == bottom && !perspective &&
      interpolate_rows(only->base + top * only->stride, only->stride, view.end, places, count, out)) {
    return true;
  }
  Corners corners;
  if (only != nullptr && only->base + (bottom + 1) * only->stride + 3 * int64_t{right} + 8 <= view.end) {
    read_inside(*only, places, count, corners);
  } else {
    read_across(view, places, count, corners);
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
      first[c][k] = static_cast<uint8_t>(rounded(std::min(std::max(sum, 0.0f), 255.0f)));
    }
  }
}

}  // namespace yolov9_fast
