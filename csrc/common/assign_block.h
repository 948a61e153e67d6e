// Task-aligned assignment on the GPU, as phases between barriers that also run on the host. Four launches:
//   prepare   the bounding box of every 32 consecutive anchor points; outputs and maxima to zero
//   claim     a block per ground truth: its topk anchors, in shared memory, are entered in a word per anchor
//   resolve   a thread per anchor: contested anchors choose; maxima per ground truth
//   weigh     a thread per anchor: the weight
// Between the launches gt_index stores the words and weight the metrics: no other memory is O(B·A). Atomics are on
// integers and maxima or appends to lists whose order has no consequence.
#pragma once

#include "common/assign.h"
#include "common/block.h"

namespace yolov9_fast::tal {

constexpr int kChunk = 32;  // anchors per bounding box: one warp's loads
constexpr int kListedChunks = 1024;
constexpr int kMaxTopk = 128;
constexpr int kMaxThreads = 256;

// Everything the phases read and write; strides in elements.
template <class Score>
struct Problem {
  const Score* scores;  // [B, A, nc]
  int64_t scores_image, scores_anchor, scores_class;
  const float* boxes;  // [B, A, 4]
  int64_t boxes_image, boxes_anchor, boxes_side;
  const float* points;    // [A, 2] dense
  const float* strides;   // [A] dense, or null
  const float* min_side;  // [1], or null
  const int64_t* labels;  // [B, N] dense
  const float* gt_boxes;  // [B, N, 4] dense
  const bool* mask;       // [B, N] dense
  int64_t batch, anchors, count, classes;
  Exponent alpha, beta;
  int topk;
  int64_t rule;

  uint64_t* words;         // [B, A]: gt_index's memory
  float* weights;          // [B, A]
  float* chunks;           // [ceil(A / kChunk), 4]: x and y, least and greatest
  uint32_t* best_metric;   // [B, N] bits
  uint32_t* best_overlap;  // [B, N] bits

  YF_HOST_DEVICE int64_t chunk_count() const { return (anchors + kChunk - 1) / kChunk; }

  YF_HOST_DEVICE Shape gt(int64_t row) const {
    const float* side = gt_boxes + 4 * row;
    return shape_of({side[0], side[1], side[2], side[3]});
  }

  YF_HOST_DEVICE Shape predicted(int64_t image, int64_t anchor) const {
    const float* side = boxes + image * boxes_image + anchor * boxes_anchor;
    return shape_of({side[0], side[boxes_side], side[2 * boxes_side], side[3 * boxes_side]});
  }

  YF_HOST_DEVICE float score(int64_t image, int64_t anchor, int64_t label) const {
    if (label < 0 || label >= classes) return 0.0f;
    return static_cast<float>(scores[image * scores_image + anchor * scores_anchor + label * scores_class]);
  }

  // The box in which a ground truth looks for anchors.
  YF_HOST_DEVICE Box searched(const Box& gt) const { return min_side == nullptr ? gt : widened(gt, *min_side); }

  YF_HOST_DEVICE bool may_learn(int64_t anchor, const Box& gt) const {
    const float x = points[2 * anchor], y = points[2 * anchor + 1];
    return rule == kMit ? within_reach(x, y, gt, kReach * strides[anchor]) : strictly_inside(x, y, searched(gt));
  }

  YF_HOST_DEVICE float metric_of(int64_t image, int64_t anchor, int64_t label, float overlap) const {
    return metric(score(image, anchor, label), overlap, alpha, beta);
  }
};

#ifdef YF_CUDA
__device__ __forceinline__ int append(int* count) { return atomicAdd(count, 1); }
__device__ __forceinline__ void raise(uint32_t* at, uint32_t value) { atomicMax(at, value); }
__device__ __forceinline__ void raise(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void enter(uint64_t* word, uint64_t key) {
  auto* at = reinterpret_cast<unsigned long long*>(word);
  unsigned long long seen = 0, expected;
  do {
    expected = seen;
    seen = atomicCAS(at, expected, static_cast<unsigned long long>(with_claim(expected, key)));
  } while (seen != expected);
}
#else
inline int append(int* count) { return (*count)++; }
template <class Bits>
void raise(Bits* at, Bits value) {
  if (value > *at) *at = value;
}
inline void enter(uint64_t* word, uint64_t key) { *word = with_claim(*word, key); }
#endif

// Index `i` of one flat range over chunks, words and maxima.
template <class Score>
YF_HOST_DEVICE void prepare(const Problem<Score>& p, int64_t i) {
  if (i < p.chunk_count()) {
    // Comparisons that NaN loses: a NaN point is in no box.
    float least_x = INFINITY, least_y = INFINITY, greatest_x = -INFINITY, greatest_y = -INFINITY;
    const int64_t end = (i + 1) * kChunk < p.anchors ? (i + 1) * kChunk : p.anchors;
    for (int64_t a = i * kChunk; a < end; ++a) {
      const float x = p.points[2 * a], y = p.points[2 * a + 1];
      least_x = x < least_x ? x : least_x;
      least_y = y < least_y ? y : least_y;
      greatest_x = x > greatest_x ? x : greatest_x;
      greatest_y = y > greatest_y ? y : greatest_y;
    }
    float* chunk = p.chunks + 4 * i;
    chunk[0] = least_x, chunk[1] = least_y, chunk[2] = greatest_x, chunk[3] = greatest_y;
  }
  if (i < p.batch * p.anchors) p.words[i] = 0;
  if (i < p.batch * p.count) p.best_metric[i] = p.best_overlap[i] = 0;
}

struct ClaimShared {
  uint64_t top[kMaxTopk], merged[kMaxTopk], added[kMaxThreads];
  uint64_t best;
  int chunks[kListedChunks];
  int kept, count_added, count_chunks;
};

// One ground truth, row = image · N + index, by one block of at most kMaxThreads threads.
template <class Block, class Score>
YF_BLOCK void claim(const Block& block, ClaimShared& shared, const Problem<Score>& p, int64_t row) {
  if (!p.mask[row]) return;
  const int64_t image = row / p.count, index = row % p.count, label = p.labels[row];
  const Shape gt = p.gt(row);
  const Box box = p.searched(gt.box);
  const int threads = block.threads();
  // A value that decides which phases follow is read after one barrier and may change only after another.
  const auto settled = [&](const int& value) {
    const int copy = value;
    block.phase([](int) {});
    return copy;
  };
  const auto take = [&](int64_t anchor) {
    enter(p.words + image * p.anchors + anchor, key_of(overlap(gt, p.predicted(image, anchor)), index));
  };

  block.phase([&](int t) {
    if (t == 0) shared.kept = shared.count_added = shared.count_chunks = 0, shared.best = 0;
  });
  for (int64_t first_chunk = 0; first_chunk < p.chunk_count(); first_chunk += kListedChunks) {
    block.phase([&](int t) {
      const int64_t end = first_chunk + kListedChunks < p.chunk_count() ? first_chunk + kListedChunks : p.chunk_count();
      for (int64_t c = first_chunk + t; c < end; c += threads) {
        const float* chunk = p.chunks + 4 * c;
        if (chunk[2] >= box.x1 && chunk[0] <= box.x2 && chunk[3] >= box.y1 && chunk[1] <= box.y2) {
          shared.chunks[append(&shared.count_chunks)] = static_cast<int>(c);
        }
      }
    });
    const int candidates = kChunk * settled(shared.count_chunks);
    for (int first = 0; first < candidates; first += threads) {
      block.phase([&](int t) {
        if (t == 0) shared.count_chunks = 0;
        if (first + t >= candidates) return;
        const int64_t a = int64_t{kChunk} * shared.chunks[(first + t) / kChunk] + (first + t) % kChunk;
        if (a >= p.anchors || !p.may_learn(a, gt.box)) return;
        const float both = overlap(gt, p.predicted(image, a));
        const float value = p.metric_of(image, a, label, both);
        if (!(value > 0.0f)) return;
        const uint64_t key = key_of(value, a);
        if (shared.kept < p.topk || key > shared.top[p.topk - 1]) shared.added[append(&shared.count_added)] = key;
      });
      const int added = settled(shared.count_added);
      if (added == 0) continue;
      const int kept = shared.kept, total = kept + added;
      // Keys are unique: the number of greater ones is the place.
      block.phase([&](int t) {
        for (int e = t; e < total; e += threads) {
          const uint64_t key = e < kept ? shared.top[e] : shared.added[e - kept];
          int place = 0;
          for (int i = 0; i < kept; ++i) place += shared.top[i] > key;
          for (int i = 0; i < added; ++i) place += shared.added[i] > key;
          if (place < p.topk) shared.merged[place] = key;
        }
      });
      block.phase([&](int t) {
        const int keep = total < p.topk ? total : p.topk;
        for (int e = t; e < keep; e += threads) shared.top[e] = shared.merged[e];
        if (t == 0) shared.kept = keep, shared.count_added = 0;
      });
    }
  }

  const int kept = shared.kept;
  block.phase([&](int t) {
    for (int e = t; e < kept; e += threads) take(index_of(shared.top[e]));
    // What is left of topk goes to the first anchors without a metric, of which those inside count.
    if (p.rule == kMit || kept >= p.topk) return;
    for (int64_t a = t; a < p.topk && a < p.anchors; a += threads) {
      int64_t before = a;
      bool listed = false;
      for (int e = 0; e < kept; ++e) {
        const int64_t positive = index_of(shared.top[e]);
        before -= positive < a;
        listed = listed || positive == a;
      }
      if (!listed && before < p.topk - kept && p.may_learn(a, gt.box)) take(a);
    }
  });
  if (p.rule != kMit || kept > 0) return;
  block.phase([&](int t) {
    uint64_t best = 0;
    for (int64_t a = t; a < p.anchors; a += threads) {
      const float value = p.metric_of(image, a, label, overlap(gt, p.predicted(image, a)));
      const uint64_t key = value > 0.0f ? key_of(value, a) : 0;
      best = key > best ? key : best;
    }
    if (best != 0) raise(&shared.best, best);
  });
  block.phase([&](int t) {
    if (t == 0 && shared.best != 0) take(index_of(shared.best));
  });
}

struct ResolveShared {
  uint64_t best[kMaxThreads];
  int anchors[kMaxThreads];
  int count;
};

// Anchors [first, first + threads) of the flat B·A by one block: words become ground truths, metrics go into weights.
template <class Block, class Score>
YF_BLOCK void resolve(const Block& block, ResolveShared& shared, const Problem<Score>& p, int64_t first) {
  constexpr int kTogether = 32;  // threads that search the ground truths of one anchor
  const int threads = block.threads();
  const int64_t all = p.batch * p.anchors;
  PerThread<int, Block> slot(block);
  block.phase([&](int t) {
    if (t == 0) shared.count = 0;
  });
  block.phase([&](int t) {
    slot[t] = -1;
    if (p.rule == kMit || first + t >= all || !(p.words[first + t] & kContested)) return;
    slot[t] = append(&shared.count);
    shared.anchors[slot[t]] = t;
    shared.best[slot[t]] = 0;
  });
  const int contested = shared.count;
  block.phase([&](int t) {
    for (int pair = t; pair < contested * kTogether; pair += threads) {
      const int at = pair / kTogether;
      const int64_t image = (first + shared.anchors[at]) / p.anchors, anchor = (first + shared.anchors[at]) % p.anchors;
      const Shape predicted = p.predicted(image, anchor);
      uint64_t best = 0;
      for (int64_t g = pair % kTogether; g < p.count; g += kTogether) {
        const int64_t row = image * p.count + g;
        const float* side = p.gt_boxes + 4 * row;
        const Box box{side[0], side[1], side[2], side[3]};
        float both = 0.0f;
        if (intersection(box, predicted.box) > 0.0f &&
            (p.rule == kYolov9 || (p.mask[row] && p.may_learn(anchor, box)))) {
          both = overlap(shape_of(box), predicted);
        }
        const uint64_t key = key_of(both, g);
        best = key > best ? key : best;
      }
      if (best != 0) raise(&shared.best[at], best);
    }
  });
  block.phase([&](int t) {
    if (first + t >= all) return;
    const uint64_t word = p.words[first + t];
    p.weights[first + t] = 0.0f;
    if (word == 0) {
      p.words[first + t] = ~uint64_t{0};  // -1 as gt_index
      return;
    }
    const int64_t image = (first + t) / p.anchors, anchor = (first + t) % p.anchors;
    const int64_t index = index_of(slot[t] >= 0 ? shared.best[slot[t]] : word), row = image * p.count + index;
    p.words[first + t] = static_cast<uint64_t>(index);
    const Shape gt = p.gt(row);
    // Rule "ultralytics" knows no overlap outside a box or with padding, the others' winners need no look.
    if (p.rule == kUltralytics && !(p.mask[row] && p.may_learn(anchor, gt.box))) return;
    const float both = overlap(gt, p.predicted(image, anchor));
    const float value = p.metric_of(image, anchor, p.labels[row], both);
    p.weights[first + t] = value;
    raise(p.best_metric + row, bits_of(value));
    raise(p.best_overlap + row, bits_of(both));
  });
}

YF_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

template <class Score>
YF_HOST_DEVICE void weigh(const Problem<Score>& p, int64_t i) {
  const int64_t index = static_cast<int64_t>(p.words[i]);
  if (index < 0) return;
  const int64_t row = i / p.anchors * p.count + index;
  p.weights[i] = weight(p.weights[i], float_of(p.best_metric[row]), float_of(p.best_overlap[row]));
}

}  // namespace yolov9_fast::tal
