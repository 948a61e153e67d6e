// The boxes kept so far, by label, stored so that a candidate is compared with sixteen of them at a time.
#pragma once

#include <cfloat>
#include <cstdint>
#include <vector>

#include "common/nms.h"

namespace yolov9_fast {

class KeptBoxes {
 public:
  // Labels are in [0, labels).
  KeptBoxes(int64_t labels, float iou) : iou_(iou), newest_(labels, kNone), used_(labels, kLanes) {}

  bool suppress(int64_t label, const Corners& box, float area) const {
    for (int32_t at = newest_[label]; at != kNone; at = groups_[at].older) {
      if (any_overlaps(groups_[at], box, area)) return true;
    }
    return false;
  }

  void add(int64_t label, const Corners& box, float area) {
    if (used_[label] == kLanes) {
      groups_.emplace_back();
      groups_.back().older = newest_[label];
      newest_[label] = static_cast<int32_t>(groups_.size()) - 1;
      used_[label] = 0;
    }
    Group& group = groups_[newest_[label]];
    const int lane = used_[label]++;
    group.x1[lane] = box.x1;
    group.y1[lane] = box.y1;
    group.x2[lane] = box.x2;
    group.y2[lane] = box.y2;
    group.area[lane] = area;
  }

 private:
  static constexpr int kLanes = 16;
  static constexpr int32_t kNone = -1;

  struct Group {
    // Free lanes have a box that overlaps none.
    Group() {
      for (int lane = 0; lane < kLanes; ++lane) {
        x1[lane] = y1[lane] = FLT_MAX;
        x2[lane] = y2[lane] = -FLT_MAX;
        area[lane] = 0.0f;
      }
    }
    float x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
    int32_t older = kNone;
  };

  bool any_overlaps(const Group& group, const Corners& box, float area) const {
    int over = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      over |= overlaps(box.x1, box.y1, box.x2, box.y2, area, group.x1[lane], group.y1[lane], group.x2[lane],
                       group.y2[lane], group.area[lane], iou_);
    }
    return over != 0;
  }

  float iou_;
  std::vector<int32_t> newest_;
  std::vector<int> used_;
  std::vector<Group> groups_;
};

}  // namespace yolov9_fast
