// Arithmetic of non-maximum suppression, the same bits on the CPU and on the GPU: boxes, overlap test, order of scores.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace yolov9_fast {

struct Corners {
  float x1, y1, x2, y2;
};

YF_HOST_DEVICE Corners corners(float x, float y, float width, float height) {
  const float half_width = width / 2.0f, half_height = height / 2.0f;
  return {x - half_width, y - half_height, x + half_width, y + half_height};
}

// Signed: two negative sides give a positive area, as in the reference; such a box intersects nothing all the same.
YF_HOST_DEVICE float signed_area(const Corners& box) { return (box.x2 - box.x1) * (box.y2 - box.y1); }

// False for NaN and for both infinities.
YF_HOST_DEVICE bool is_finite(float value) { return value - value == 0.0f; }

YF_HOST_DEVICE bool is_finite(const Corners& box) {
  return is_finite(box.x1) && is_finite(box.y1) && is_finite(box.x2) && is_finite(box.y2);
}

// Whether IoU(a, b) > limit. A box with a NaN corner has a NaN area, so the comparison fails, whatever the corners that
// the comparisons below choose; 0/0 of two boxes without area fails too.
YF_HOST_DEVICE bool overlaps(float ax1, float ay1, float ax2, float ay2, float a_area, float bx1, float by1, float bx2,
                             float by2, float b_area, float limit) {
  const float width = (ax2 < bx2 ? ax2 : bx2) - (ax1 > bx1 ? ax1 : bx1);
  const float height = (ay2 < by2 ? ay2 : by2) - (ay1 > by1 ? ay1 : by1);
  const float both = (width > 0.0f ? width : 0.0f) * (height > 0.0f ? height : 0.0f);
  return both / (a_area + b_area - both) > limit;
}

// An unsigned integer that orders scores as sorting does: NaN above everything, −0 equal to 0.
YF_HOST_DEVICE uint32_t rank_of_score(float score) {
  if (score != score) return 0xFFFFFFFFu;
  const float value = score + 0.0f;  // −0 becomes 0
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

YF_HOST_DEVICE float score_of_rank(uint32_t rank) {
  const uint32_t bits = rank & 0x80000000u ? rank & 0x7FFFFFFFu : ~rank;
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

// A candidate as one number: the larger comes first. Equal scores: the smaller index first. Never 0, never twice.
YF_HOST_DEVICE uint64_t candidate_key(uint32_t rank, uint32_t index) {
  return static_cast<uint64_t>(rank) << 32 | (0xFFFFFFFFu - index);
}

YF_HOST_DEVICE uint32_t index_of_key(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

YF_HOST_DEVICE uint32_t rank_of_key(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

}  // namespace yolov9_fast
