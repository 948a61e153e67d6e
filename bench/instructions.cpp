// Runs an algorithm of csrc/common on fixed inputs, so that its instructions can be counted: ./driver NAME REPEATS.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/box_iou.h"

namespace {

constexpr int kBoxes = 200;

// A small generator of our own: the same numbers with every standard library.
float next(uint64_t& state) {
  state = state * 6364136223846793005ULL + 1442695040888963407ULL;
  return static_cast<float>(state >> 40) / static_cast<float>(1 << 24);
}

std::vector<float> boxes(uint64_t seed) {
  std::vector<float> all(4 * kBoxes);
  for (int i = 0; i < kBoxes; ++i) {
    const float x = 600 * next(seed), y = 600 * next(seed);
    all[4 * i] = x, all[4 * i + 1] = y;
    all[4 * i + 2] = x + 40 * next(seed), all[4 * i + 3] = y + 40 * next(seed);
  }
  return all;
}

double box_iou_once() {
  const std::vector<float> a = boxes(1), b = boxes(2);
  double sum = 0;
  for (int i = 0; i < kBoxes; ++i) {
    const float* p = &a[4 * i];
    const float p_area = yolov9_fast::box_area(p[0], p[1], p[2], p[3]);
    for (int j = 0; j < kBoxes; ++j) {
      const float* q = &b[4 * j];
      const float q_area = yolov9_fast::box_area(q[0], q[1], q[2], q[3]);
      sum += yolov9_fast::box_iou(p[0], p[1], p[2], p[3], p_area, q[0], q[1], q[2], q[3], q_area);
    }
  }
  return sum;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3 || std::strcmp(words[1], "box_iou") != 0) return 2;
  double sum = 0;
  for (int repeat = std::atoi(words[2]); repeat > 0; --repeat) sum += box_iou_once();
  std::printf("%.6f\n", sum);
  return 0;
}
