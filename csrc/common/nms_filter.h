// The GPU's choice of candidates among all scores of a prediction, as phases of blocks of threads: count by digits of
// the key, find the key of the last of the best max_candidates, store the keys that may be among them.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/nms_block.h"

namespace yolov9_fast::suppression {

// Classes that may be detected, by bit; a kernel argument, of which there are at most 4 KB.
struct Wanted {
  static constexpr int64_t kMost = 24576;
  uint32_t words[kMost / 32];
  bool all;

  YF_HOST_DEVICE bool holds(int64_t label) const { return all || (words[label / 32] >> label % 32 & 1) != 0; }
};

// Fixes the numbers of classes a thread walks through: enough work for one histogram, enough blocks for one GPU.
constexpr int64_t kClassesPerBlock = 40;

struct Prediction {
  const float* data;
  int64_t image, channel;  // strides in elements; anchors are adjacent
  int64_t images, classes, anchors;
  float conf;
  bool multi_label, agnostic;

  YF_HOST_DEVICE int64_t classes_per_block() const { return multi_label ? kClassesPerBlock : classes; }
  YF_HOST_DEVICE int64_t blocks(int64_t threads) const {
    return (anchors + threads - 1) / threads * ((classes + classes_per_block() - 1) / classes_per_block());
  }
  YF_HOST_DEVICE Corners box(const float* one, int64_t anchor) const {
    const float* at = one + anchor;
    return corners(at[0], at[channel], at[2 * channel], at[3 * channel]);
  }
};

YF_HOST_DEVICE uint64_t prediction_key(float score, uint64_t index) {
  uint32_t bits;  // of a positive score: they order as it does, and leave the top digit small
  __builtin_memcpy(&bits, &score, sizeof bits);
  return candidate_key(bits, static_cast<uint32_t>(index));
}

// Calls use(key) for each candidate of thread `t` in part `part` of an image.
template <class Use>
YF_BLOCK void visit(const Prediction& view, const Wanted& wanted, const float* one, int64_t part, int64_t threads,
                    int t, const Use& use) {
  const uint32_t columns = static_cast<uint32_t>((view.anchors + threads - 1) / threads);
  const uint32_t row = static_cast<uint32_t>(part) / columns;
  const int64_t anchor = (static_cast<uint32_t>(part) - row * columns) * threads + t;
  if (anchor >= view.anchors || !is_finite(view.box(one, anchor))) return;
  const float* scores = one + 4 * view.channel + anchor;
  const int64_t first = row * view.classes_per_block();
  const int64_t end = first + view.classes_per_block() < view.classes ? first + view.classes_per_block() : view.classes;
  if (view.multi_label) {
    constexpr int kAtOnce = 4;  // loads in flight; with 8 the registers spill
    for (int64_t label = first; label < end; label += kAtOnce) {
      float score[kAtOnce];
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int i = 0; i < kAtOnce; ++i) score[i] = label + i < end ? scores[(label + i) * view.channel] : 0.0f;
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int i = 0; i < kAtOnce; ++i) {
        if (score[i] > view.conf && score[i] <= FLT_MAX && wanted.holds(label + i)) {
          use(prediction_key(score[i], anchor * view.classes + label + i));
        }
      }
    }
    return;
  }
  float best = -1.0f;
  int64_t chosen = 0;
  for (int64_t label = first; label < end; ++label) {
    const float score = scores[label * view.channel];
    if (score > best && score <= FLT_MAX) {
      best = score;
      chosen = label;
    }
  }
  if (best > view.conf && wanted.holds(chosen)) use(prediction_key(best, anchor * view.classes + chosen));
}

// Of one image: what the filter knows. Zero at the start.
struct Cut {
  uint64_t least;    // of the keys to store
  int64_t total;     // candidates
  uint32_t greater;  // keys above the prefix `least`
  int stored;
  int settled;
};

template <class S>
struct CountShared {
  uint32_t histogram[S::kBuckets];
};

// Adds the digits of one part's candidates to the image's histogram, digits after the first only of keys with the
// prefix.
template <class S, class Block>
YF_BLOCK void count_part(const Block& block, CountShared<S>& shared, const Prediction& view, const Wanted& wanted,
                         const float* one, int64_t part, int level, const Cut& cut, uint32_t* histogram) {
  if (cut.settled) return;
  const Digit<S> digit(level);
  block.phase([&](int t) {
    for (int i = t; i < S::kBuckets; i += block.threads()) shared.histogram[i] = 0;
  });
  block.phase([&](int t) {
    visit(view, wanted, one, part, block.threads(), t, [&](uint64_t key) {
      if (digit.shares_prefix(key, cut.least)) fetch_add(&shared.histogram[digit.of(key)], uint32_t{1});
    });
  });
  block.phase([&](int t) {
    for (int i = t; i < S::kBuckets; i += block.threads()) {
      if (shared.histogram[i] != 0) fetch_add(&histogram[i], shared.histogram[i]);
    }
  });
}

// From an image's histogram of one digit: the bucket in which the best `limit` end. Settled when that bucket fits too.
template <class S, class Block>
YF_BLOCK void pick_digit(const Block& block, FindShared<S>& shared, const uint32_t* histogram, int level, int64_t limit,
                         Cut& cut) {
  if (cut.settled) return;
  const uint32_t greater = cut.greater;
  const uint32_t need = static_cast<uint32_t>(limit < 0xFFFFFFFF ? limit : 0xFFFFFFFF) - greater;
  find_bucket<S>(block, shared, histogram, need);
  block.phase([&](int t) {
    if (t != 0) return;
    if (level == 0) cut.total = shared.total;
    const bool fewer = shared.bucket < 0 || (level == 0 && cut.total <= limit);
    if (fewer) {
      cut.settled = 1;
      return;
    }
    const Digit<S> digit(level);
    cut.least |= static_cast<uint64_t>(shared.bucket) << digit.shift;
    cut.greater = greater + shared.greater;
    const int64_t stored = static_cast<int64_t>(cut.greater) + histogram[shared.bucket];
    cut.settled = stored <= limit + S::kSlack || digit.last();
  });
}

template <class S>
struct SettleShared {
  uint32_t histogram[S::kBuckets];
  FindShared<S> find;
};

// Digits from `level` on, by one block: only where so many scores are equal that the bucket of the cut is still large.
template <class S, class Block>
YF_BLOCK void settle(const Block& block, SettleShared<S>& shared, const Prediction& view, const Wanted& wanted,
                     const float* one, int level, int64_t limit, Cut& cut) {
  const int64_t parts = view.blocks(block.threads());
  for (; !cut.settled; ++level) {
    const Digit<S> digit(level);
    block.phase([&](int t) {
      for (int i = t; i < S::kBuckets; i += block.threads()) shared.histogram[i] = 0;
    });
    block.phase([&](int t) {
      for (int64_t part = 0; part < parts; ++part) {
        visit(view, wanted, one, part, block.threads(), t, [&](uint64_t key) {
          if (digit.shares_prefix(key, cut.least)) fetch_add(&shared.histogram[digit.of(key)], uint32_t{1});
        });
      }
    });
    pick_digit<S>(block, shared.find, shared.histogram, level, limit, cut);
  }
}

struct StoreShared {
  int total, base;
};

// Appends one part's keys that may be among the best to the image's keys; where a block's keys go varies.
template <class Block>
YF_BLOCK void store_part(const Block& block, StoreShared& shared, const Prediction& view, const Wanted& wanted,
                         const float* one, int64_t part, Cut& cut, uint64_t* keys) {
  const uint64_t least = cut.least;
  PerThread<int, Block> offset(block);
  block.phase([&](int t) {
    if (t == 0) shared.total = 0;
  });
  block.phase([&](int t) {
    int mine = 0;
    visit(view, wanted, one, part, block.threads(), t, [&](uint64_t key) { mine += key >= least; });
    offset[t] = mine == 0 ? 0 : fetch_add(&shared.total, mine);
  });
  if (shared.total == 0) return;
  block.phase([&](int t) {
    if (t == 0) shared.base = fetch_add(&cut.stored, shared.total);
  });
  block.phase([&](int t) {
    uint64_t* next = keys + shared.base + offset[t];
    visit(view, wanted, one, part, block.threads(), t, [&](uint64_t key) {
      if (key >= least) *next++ = key;
    });
  });
}

// The candidate behind a key of a prediction.
struct PredictionSource {
  const Prediction* view;
  const float* one;

  YF_BLOCK Candidate operator()(uint64_t key) const {
    const uint32_t index = index_of_key(key), classes = static_cast<uint32_t>(view->classes);
    const Corners box = view->box(one, index / classes);
    return {box, signed_area(box), view->agnostic ? 0 : static_cast<int64_t>(index % classes)};
  }
};

// The rows of one image's result.
struct PredictionRows {
  const Prediction* view;
  const float* one;
  float* boxes;     // [max_det, 6]
  int64_t* anchor;  // [max_det]

  YF_BLOCK void operator()(int64_t place, uint64_t key) const {
    const uint32_t index = index_of_key(key), classes = static_cast<uint32_t>(view->classes);
    const Corners box = view->box(one, index / classes);
    const uint32_t bits = rank_of_key(key);
    float score;
    __builtin_memcpy(&score, &bits, sizeof score);
    float* row = boxes + 6 * place;
    row[0] = box.x1;
    row[1] = box.y1;
    row[2] = box.x2;
    row[3] = box.y2;
    row[4] = score;
    row[5] = static_cast<float>(index % classes);
    anchor[place] = index / classes;
  }
};

template <class S, class Block>
YF_BLOCK void suppress_image(const Block& block, Shared<S>& shared, const Prediction& view, const float* one,
                             const Cut& cut, const uint64_t* keys, int64_t limit, int64_t max_det, float iou,
                             Kept* kept, float* boxes, int64_t* anchor, int64_t* count, int64_t* candidates) {
  const int64_t survivors = greedy<S>(block, shared, keys, cut.stored, limit, max_det, iou, kept,
                                      PredictionSource{&view, one}, PredictionRows{&view, one, boxes, anchor});
  block.phase([&](int t) {
    if (t == 0) {
      *count = survivors;
      *candidates = cut.total;
    }
    for (int64_t i = survivors + t; i < max_det; i += block.threads()) anchor[i] = -1;
    for (int64_t i = 6 * survivors + t; i < 6 * max_det; i += block.threads()) boxes[i] = 0.0f;
  });
}

// The box behind a key of nms_boxes.
struct BoxSource {
  const Corners* boxes;
  const int64_t* labels;  // or null: all of one

  YF_BLOCK Candidate operator()(uint64_t key) const {
    const uint32_t index = index_of_key(key);
    const Corners box = boxes[index];
    return {box, signed_area(box), labels == nullptr ? 0 : labels[index]};
  }
};

struct IndexRows {
  int64_t* index;

  YF_BLOCK void operator()(int64_t place, uint64_t key) const { index[place] = index_of_key(key); }
};

template <class S, class Block>
YF_BLOCK void suppress_boxes(const Block& block, Shared<S>& shared, const BoxSource& source, const uint64_t* keys,
                             int64_t total, int64_t max_det, float iou, Kept* kept, int64_t* index, int64_t* count) {
  const int64_t survivors = greedy<S>(block, shared, keys, total, total, max_det, iou, kept, source, IndexRows{index});
  block.phase([&](int t) {
    if (t == 0) *count = survivors;
    for (int64_t i = survivors + t; i < max_det; i += block.threads()) index[i] = -1;
  });
}

}  // namespace yolov9_fast::suppression
