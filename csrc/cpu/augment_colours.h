// Hue, saturation and value of blocks of pixels through tables: OpenCV's BGR2HSV, LUT and HSV2BGR of 8 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/augment_rows.h"

namespace yolov9_fast {

#if defined(__AVX512VBMI__)
// 64 levels of 32 bits, in the order in which unpack instructions leave them and pack instructions take them.
struct Levels {
  __m512i part[4];
};

inline Levels widened(__m512i bytes) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi8(bytes, zero), high = _mm512_unpackhi_epi8(bytes, zero);
  return {{_mm512_unpacklo_epi16(low, zero), _mm512_unpackhi_epi16(low, zero), _mm512_unpacklo_epi16(high, zero),
           _mm512_unpackhi_epi16(high, zero)}};
}

inline __m512i narrowed(const Levels& levels) {
  return _mm512_packus_epi16(_mm512_packs_epi32(levels.part[0], levels.part[1]),
                             _mm512_packs_epi32(levels.part[2], levels.part[3]));
}

inline __m512 as_floats(__m512i levels) { return _mm512_maskz_cvtepi32_ps(0xffff, levels); }

inline __m512i whole_of(__m512 values) { return _mm512_maskz_cvttps_epi32(0xffff, values); }

inline __m512i looked_up(const uint8_t* table, __m512i index) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), index, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// `number` / (4096 * max(levels, 1)) to the nearest 1/4096. The remainder corrects the quotient of an approximate
// reciprocal; no quotient is nearer to the middle of two results than that leaves it.
inline __m512 share_of(float number, __m512 levels) {
  const __m512 divisor = _mm512_maskz_max_ps(0xffff, levels, _mm512_set1_ps(1.0f));
  const __m512 whole = _mm512_set1_ps(number / 4096);
  const __m512 reciprocal = _mm512_maskz_rcp14_ps(0xffff, divisor), first = whole * reciprocal;
  const __m512 quotient = _mm512_fmadd_ps(reciprocal, _mm512_fnmadd_ps(first, divisor, whole), first);
  const __m512 shift = _mm512_set1_ps(12582912.0f / 4096);
  return (quotient + shift) - shift;
}

// Products of a level and a share are multiples of 1/4096 below 256: exact.
inline __m512i rounded_product(__m512 levels, __m512 share) {
  return _mm512_maskz_cvt_roundps_epi32(0xffff, _mm512_fmadd_ps(levels, share, _mm512_set1_ps(0.5f)),
                                        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// In place: blue, green, red. `tables`: 256 hues, saturations and values.
inline void change_colours(const uint8_t* tables, uint8_t block[3][kBlock]) {
  const __m512i b = _mm512_load_si512(block[0]), g = _mm512_load_si512(block[1]), r = _mm512_load_si512(block[2]);
  __m512i value = _mm512_max_epu8(_mm512_max_epu8(b, g), r);
  const __m512i spread = _mm512_sub_epi8(value, _mm512_min_epu8(_mm512_min_epu8(b, g), r));
  const __mmask64 from_red = _mm512_cmpeq_epi8_mask(value, r);
  const __mmask64 from_green = _mm512_cmpeq_epi8_mask(value, g) & ~from_red;
  const __m512i plus = _mm512_mask_blend_epi8(from_red, _mm512_mask_blend_epi8(from_green, r, b), g);
  const __m512i minus = _mm512_mask_blend_epi8(from_red, _mm512_mask_blend_epi8(from_green, g, r), b);
  // How many spreads the sector begins at.
  const __m512i begin = _mm512_mask_mov_epi8(_mm512_maskz_set1_epi8(~from_red, 4), from_green, _mm512_set1_epi8(2));
  const Levels pluses = widened(plus), minuses = widened(minus), begins = widened(begin);
  Levels hues, saturations = widened(spread), values = widened(value);
  for (int i = 0; i < 4; ++i) {
    const __m512 spreads = as_floats(saturations.part[i]);
    const __m512 difference = as_floats(_mm512_sub_epi32(pluses.part[i], minuses.part[i]));
    const __m512 turned = _mm512_fmadd_ps(as_floats(begins.part[i]), spreads, difference);
    const __m512i hue = rounded_product(turned, share_of(122880, spreads));
    const __mmask16 below = _mm512_cmplt_epi32_mask(hue, _mm512_setzero_si512());
    hues.part[i] = _mm512_mask_add_epi32(hue, below, hue, _mm512_set1_epi32(180));
    saturations.part[i] = rounded_product(spreads, share_of(1044480, as_floats(values.part[i])));
  }
  const __m512i hue = looked_up(tables, narrowed(hues));
  const __m512i saturation = looked_up(tables + 256, narrowed(saturations));
  value = looked_up(tables + 512, value);
  hues = widened(hue), saturations = widened(saturation), values = widened(value);
  Levels mosts, leasts, betweens;
  const __m512 one = _mm512_set1_ps(1.0f), largest = _mm512_set1_ps(255.0f), step = _mm512_set1_ps(1.0f / 255);
  for (int i = 0; i < 4; ++i) {
    const __m512 h = as_floats(hues.part[i]) * _mm512_set1_ps(6.0f / 180);
    const __m512i whole = whole_of(h);
    const __m512 part = h - as_floats(whole);
    const __m512 slope = _mm512_mask_sub_ps(part, _mm512_testn_epi32_mask(whole, _mm512_set1_epi32(1)), one, part);
    const __m512 s = as_floats(saturations.part[i]) * step, v = as_floats(values.part[i]) * step;
    mosts.part[i] = whole_of(v * largest);
    leasts.part[i] = whole_of(v * (one - s) * largest);
    betweens.part[i] = whole_of(v * _mm512_fnmadd_ps(s, slope, one) * largest);
  }
  const __m512i most = narrowed(mosts), least = narrowed(leasts), between = narrowed(betweens);
  // Which of them is which colour, in the six sectors of the circle; from 180 on hues are those of the first ones.
  const __m512i place = _mm512_min_epu8(hue, _mm512_sub_epi8(hue, _mm512_set1_epi8(static_cast<char>(180))));
  __mmask64 from[6];
  for (int i = 1; i < 6; ++i) from[i] = _mm512_cmpge_epu8_mask(place, _mm512_set1_epi8(static_cast<char>(30 * i)));
  const auto chosen = [&](__mmask64 is_most, __mmask64 is_least) {
    return _mm512_mask_blend_epi8(is_least, _mm512_mask_blend_epi8(is_most, between, most), least);
  };
  _mm512_store_si512(block[0], chosen(from[3] & ~from[5], ~from[2]));
  _mm512_store_si512(block[1], chosen(from[1] & ~from[3], from[4]));
  _mm512_store_si512(block[2], chosen(~from[1] | from[5], from[2] & ~from[4]));
}
#else
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
  for (int k = 0; k < kBlock; ++k) {
    hue[k] = tables[hue[k]];
    saturation[k] = tables[256 + saturation[k]];
    value[k] = tables[512 + value[k]];
  }
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
#endif

}  // namespace yolov9_fast
