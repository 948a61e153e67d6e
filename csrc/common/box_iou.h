// Intersection over union of two boxes, the same arithmetic on the CPU and on the GPU.
#pragma once

#include "common/host_device.h"

namespace yolov9_fast {

// Written so that NaN passes through, as it does in torch.clamp(x, min=0).
YF_HOST_DEVICE float not_negative(float x) { return x < 0.0f ? 0.0f : x; }

YF_HOST_DEVICE float box_area(float x1, float y1, float x2, float y2) {
  return not_negative(x2 - x1) * not_negative(y2 - y1);
}

// Boxes without area have IoU 0; a NaN coordinate makes its box's area, and so the result, NaN.
YF_HOST_DEVICE float box_iou(float ax1, float ay1, float ax2, float ay2, float a_area, float bx1, float by1, float bx2,
                             float by2, float b_area) {
  const float left = ax1 > bx1 ? ax1 : bx1;
  const float top = ay1 > by1 ? ay1 : by1;
  const float right = ax2 < bx2 ? ax2 : bx2;
  const float bottom = ay2 < by2 ? ay2 : by2;
  const float both = box_area(left, top, right, bottom);
  const float either = a_area + b_area - both;
  return either == 0.0f ? 0.0f : both / either;
}

}  // namespace yolov9_fast
