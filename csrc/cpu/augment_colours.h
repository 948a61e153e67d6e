// Hue, saturation and value of blocks of pixels through tables: OpenCV's BGR2HSV, LUT and HSV2BGR of 8 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/augment_rows.h"

namespace yolov9_fast {

inline void look_up(const uint8_t* table, uint8_t* values) {
#if defined(__AVX512VBMI__)
  const __m512i index = _mm512_load_si512(values);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), index, _mm512_loadu_si512(table + 192));
  _mm512_store_si512(values, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
#else
  for (int k = 0; k < kBlock; ++k) values[k] = table[values[k]];
#endif
}

// In place: blue, green, red. `tables`: 256 hues, saturations and values.
inline void change_colours(const uint8_t* tables, uint8_t block[3][kBlock]) {
  alignas(64) uint8_t hue[kBlock], saturation[kBlock], value[kBlock];
  for (int k = 0; k < kBlock; ++k) {
    const int32_t b = block[0][k], g = block[1][k], r = block[2][k];
    const int32_t v = std::max(std::max(b, g), r), spread = v - std::min(std::min(b, g), r);
    const int32_t by_value = rounded(1044480.0f / static_cast<float>(std::max(v, 1)));
    const int32_t by_spread = rounded(122880.0f / static_cast<float>(std::max(spread, 1)));
    const int32_t from_red = g - b, from_green = b - r + 2 * spread, from_blue = r - g + 4 * spread;
    const int32_t turned = v == r ? from_red : v == g ? from_green : from_blue;
    const int32_t h = (turned * by_spread + 2048) >> 12;
    hue[k] = static_cast<uint8_t>(h < 0 ? h + 180 : h);
    saturation[k] = static_cast<uint8_t>((spread * by_value + 2048) >> 12);
    value[k] = static_cast<uint8_t>(v);
  }
  look_up(tables, hue);
  look_up(tables + 256, saturation);
  look_up(tables + 512, value);
  for (int k = 0; k < kBlock; ++k) {
    const float h = static_cast<float>(hue[k]) * (6.0f / 180);
    const int32_t whole = static_cast<int32_t>(h);
    const float part = h - static_cast<float>(whole);
    const int32_t sector = whole >= 6 ? whole - 6 : whole;
    const float s = static_cast<float>(saturation[k]) * (1.0f / 255), v = static_cast<float>(value[k]) * (1.0f / 255);
    const float slope = sector & 1 ? part : 1.0f - part;
    const auto most = static_cast<int32_t>(v * 255.0f);
    const auto least = static_cast<int32_t>(v * (1.0f - s) * 255.0f);
    const auto between = static_cast<int32_t>(v * multiply_add(-s, slope, 1.0f) * 255.0f);
    // Which of them is which colour, in the six sectors of the circle.
    block[0][k] = static_cast<uint8_t>(sector < 2 ? least : sector == 3 || sector == 4 ? most : between);
    block[1][k] = static_cast<uint8_t>(sector == 1 || sector == 2 ? most : sector > 3 ? least : between);
    block[2][k] = static_cast<uint8_t>(sector == 0 || sector == 5 ? most : sector == 1 || sector == 4 ? between : least);
  }
}

}  // namespace yolov9_fast
