// assign on the CPU. Anchors are processed in groups of 16 with their boxes as a structure of arrays; a ground truth
// visits the groups whose bounding box overlaps it, for any arrangement of the points. Threads share ground truths,
// then anchors; they exchange maxima of integers only, so any number of them gives the same bits. 24 bytes of scratch
// per anchor.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "common/assign_arguments.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::tal;

constexpr int64_t kLanes = 16;

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Bit j: a[j] > b[j] (or >=) for 16 lanes; false where one is NaN.
enum class Compare { kGreater, kGreaterEqual };
template <Compare compare>
uint32_t lanes_where(const float* a, float b) {
#if defined(__AVX512F__)
  constexpr int how = compare == Compare::kGreater ? _CMP_GT_OQ : _CMP_GE_OQ;
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(a), _mm512_set1_ps(b), how);
#elif defined(__AVX2__)
  constexpr int how = compare == Compare::kGreater ? _CMP_GT_OQ : _CMP_GE_OQ;
  const __m256 all = _mm256_set1_ps(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(a), all, how));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(a + 8), all, how));
  return static_cast<uint32_t>(low | high << 8);
#else
  uint32_t bits = 0;
  for (int j = 0; j < kLanes; ++j) {
    bits |= static_cast<uint32_t>(compare == Compare::kGreater ? a[j] > b : a[j] >= b) << j;
  }
  return bits;
#endif
}

uint32_t positive_lanes(const float* values) { return lanes_where<Compare::kGreater>(values, 0.0f); }

// Runs body(task) for every task; each thread takes the next one when it is free.
template <class Body>
void share_out(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// Loops over sixteen lanes that are functions of their own: inlined into their callers they are no longer made vectors.
#define YF_LANES __attribute__((noinline))

// From 16 x1, 16 y1, 16 x2, 16 y2: columns of x1, y1, x2, y2, area and aspect at distance `next`.
YF_LANES void write_shapes(const float* __restrict corners, float* to, int64_t next) {
  const float *x1 = corners, *y1 = x1 + kLanes, *x2 = y1 + kLanes, *y2 = x2 + kLanes;
  float* __restrict area = to + 4 * next, * __restrict aspect = to + 5 * next;
  for (int k = 0; k < 4; ++k) std::copy_n(corners + k * kLanes, kLanes, to + k * next);
  for (int j = 0; j < kLanes; ++j) {
    const Shape shape = shape_of({x1[j], y1[j], x2[j], y2[j]});
    area[j] = shape.area, aspect[j] = shape.aspect;
  }
}

YF_LANES void published_metrics(const float* score, const float* both, float* __restrict value) {
  for (int j = 0; j < kLanes; ++j) value[j] = published_metric(score[j], both[j]);
}

// Boxes as columns, padded to full groups of 16.
struct Columns {
  explicit Columns(int64_t count_) : count(padded(count_)), data(std::make_unique_for_overwrite<float[]>(6 * count)) {}

  void set(int64_t first, const float* corners) { write_shapes(corners, data.get() + first, count); }

  Shape operator[](int64_t i) const { return Lanes(*this, i)[0]; }

  // Sixteen of them, or any number of neighbours.
  struct Lanes {
    Lanes(const Columns& columns, int64_t first)
        : x1(columns.data.get() + first),
          y1(x1 + columns.count),
          x2(y1 + columns.count),
          y2(x2 + columns.count),
          area(y2 + columns.count),
          aspect(area + columns.count) {}

    Box box(int64_t j) const { return {x1[j], y1[j], x2[j], y2[j]}; }
    Shape operator[](int64_t j) const { return {box(j), area[j], aspect[j]}; }

    const float *x1, *y1, *x2, *y2, *area, *aspect;
  };

  int64_t count;
  std::unique_ptr<float[]> data;
};

struct Claim {
  float metric, overlap;
  int64_t anchor;
};

// The best claims so far, best first. Anchors come in their order, so an equal one stays behind.
class Top {
 public:
  explicit Top(int size) : size_(size) {}

  float floor() const { return kept_ < size_ ? 0.0f : claims_[size_ - 1].metric; }

  void insert(const Claim& claim) {
    int at = kept_ < size_ ? kept_++ : size_ - 1;
    for (; at > 0 && claims_[at - 1].metric < claim.metric; --at) claims_[at] = claims_[at - 1];
    claims_[at] = claim;
  }

  int kept() const { return kept_; }
  const Claim* begin() const { return claims_; }
  const Claim* end() const { return claims_ + kept_; }

 private:
  Claim claims_[kMaxTopk];
  int size_, kept_ = 0;
};

template <class Score, bool kPublished>
class Assigner {
 public:
  explicit Assigner(const Problem<Score>& problem)
      : p_(problem),
        width_(padded(p_.anchors)),
        depth_(padded(p_.count)),
        chunks_(padded(width_ / kLanes)),
        predicted_(p_.batch * width_),
        gt_boxes_(p_.batch * depth_),
        x_(width_, kNan),
        y_(width_, kNan),
        reach_(p_.rule == kMit ? width_ : 0),
        chunk_sides_(4 * chunks_, -std::numeric_limits<float>::infinity()) {}

  void run() {
    prepare_points();
    constexpr int64_t kAnchorsOfTask = 2048;
    const int64_t tasks_of_image = (p_.anchors + kAnchorsOfTask - 1) / kAnchorsOfTask;
    const auto for_anchors = [&](const auto& body) {
      share_out(p_.batch * tasks_of_image, [&](int64_t task) {
        const int64_t begin = task % tasks_of_image * kAnchorsOfTask;
        body(task / tasks_of_image, begin, std::min(p_.anchors, begin + kAnchorsOfTask));
      });
    };
    for_anchors([&](int64_t image, int64_t begin, int64_t end) { prepare_boxes(image, begin, end); });
    std::vector<int64_t> rows;
    for (int64_t image = 0; image < p_.batch; ++image) {
      const float* gt_boxes = p_.gt_boxes + 4 * image * p_.count;
      for (int64_t g = 0; g < depth_; g += kLanes) set(gt_boxes_, image * depth_ + g, gt_boxes, 4, 1, g, p_.count);
      for (int64_t row = image * p_.count; row < (image + 1) * p_.count; ++row) {
        if (p_.mask[row]) rows.push_back(row);
      }
    }
    constexpr int64_t kRowsOfTask = 4;
    share_out((static_cast<int64_t>(rows.size()) + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task) {
      const size_t end = std::min(rows.size(), static_cast<size_t>((task + 1) * kRowsOfTask));
      for (size_t i = task * kRowsOfTask; i < end; ++i) claim(rows[i]);
    });
    for_anchors([&](int64_t image, int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) resolve(image, a);
    });
    for_anchors([&](int64_t image, int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) weigh(p_, image * p_.anchors + a);
    });
  }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  void prepare_points() {
    float* sides = chunk_sides_.data();
    for (int64_t a = 0; a < p_.anchors; ++a) {
      const float x = p_.points[2 * a], y = p_.points[2 * a + 1];
      x_[a] = x, y_[a] = y;
      if (p_.rule == kMit) reach_[a] = kReach * p_.strides[a];
      float* side = sides + a / kLanes;
      // Least sides with the sign turned, so that every test is a ">=" and emptiness is -infinity.
      side[0] = upper(-x, side[0]);
      side[chunks_] = upper(-y, side[chunks_]);
      side[2 * chunks_] = upper(x, side[2 * chunks_]);
      side[3 * chunks_] = upper(y, side[3 * chunks_]);
    }
  }

  void prepare_boxes(int64_t image, int64_t begin, int64_t end) {
    const float* boxes = p_.boxes + image * p_.boxes_image;
    for (int64_t a = begin; a < end; a += kLanes) {
      set(predicted_, image * width_ + a, boxes, p_.boxes_anchor, p_.boxes_side, a, p_.anchors);
    }
    std::fill(p_.words + image * p_.anchors + begin, p_.words + image * p_.anchors + end, 0);
  }

  // Boxes [first, first + 16) of `count`, zeros beyond, from strided corners.
  static void set(Columns& columns, int64_t at, const float* boxes, int64_t step, int64_t side, int64_t first,
                  int64_t count) {
    alignas(64) float corners[4 * kLanes] = {};
    const int64_t lanes = std::min(kLanes, count - first);
    for (int64_t j = 0; j < lanes; ++j) {
      const float* box = boxes + (first + j) * step;
      for (int k = 0; k < 4; ++k) corners[k * kLanes + j] = box[k * side];
    }
    columns.set(at, corners);
  }

  // Overlaps of 16 anchors with `gt`, 0 for those that may not learn it.
  template <int64_t rule>
  void overlaps(int64_t base, int64_t first, const Shape& gt, const Box& searched, float* __restrict both) const {
    const float *x = x_.data() + first, *y = y_.data() + first, *reach = reach_.data() + (rule == kMit ? first : 0);
    const Columns::Lanes predicted(predicted_, base + first);
    const Shape target = gt;
    const Box box = searched;
    for (int j = 0; j < kLanes; ++j) {
      const bool inside = rule == kMit ? within_reach(x[j], y[j], box, reach[rule == kMit ? j : 0])
                                       : strictly_inside(x[j], y[j], box);
      const float value = overlap(target, predicted[j]);
      both[j] = inside ? value : 0.0f;
    }
  }

  void gather(int64_t image, int64_t first, int64_t label, const float* both, Top& top) const {
    uint32_t lanes = positive_lanes(both);
    if (lanes == 0) return;
    alignas(64) float score[kLanes] = {}, value[kLanes] = {};
    const Score* from = p_.scores + image * p_.scores_image + label * p_.scores_class;
    const bool known = label >= 0 && label < p_.classes;
    for (uint32_t left = known ? lanes : 0; left != 0; left &= left - 1) {
      const int j = __builtin_ctz(left);
      score[j] = static_cast<float>(from[(first + j) * p_.scores_anchor]);
    }
    if constexpr (kPublished) {
      published_metrics(score, both, value);
    } else {
      for (uint32_t left = lanes; left != 0; left &= left - 1) {
        const int j = __builtin_ctz(left);
        value[j] = metric(score[j], both[j], p_.alpha, p_.beta);
      }
    }
    for (lanes &= lanes_where<Compare::kGreater>(value, top.floor()); lanes != 0; lanes &= lanes - 1) {
      const int j = __builtin_ctz(lanes);
      if (value[j] > top.floor()) top.insert({value[j], both[j], first + j});
    }
  }

  void claim(int64_t row) const {
    const int64_t image = row / p_.count, index = row % p_.count, base = image * width_, label = p_.labels[row];
    const Shape gt = gt_boxes_[image * depth_ + index];
    const Box box = p_.searched(gt.box);
    Top top(p_.topk);
    alignas(64) float both[kLanes];
    const float* sides = chunk_sides_.data();
    for (int64_t c = 0; c < chunks_; c += kLanes) {
      uint32_t meeting = lanes_where<Compare::kGreaterEqual>(sides + c, -box.x2) &
                         lanes_where<Compare::kGreaterEqual>(sides + chunks_ + c, -box.y2) &
                         lanes_where<Compare::kGreaterEqual>(sides + 2 * chunks_ + c, box.x1) &
                         lanes_where<Compare::kGreaterEqual>(sides + 3 * chunks_ + c, box.y1);
      for (; meeting != 0; meeting &= meeting - 1) {
        const int64_t first = (c + __builtin_ctz(meeting)) * kLanes;
        if (first >= width_) break;
        p_.rule == kMit ? overlaps<kMit>(base, first, gt, box, both) : overlaps<kYolov9>(base, first, gt, box, both);
        gather(image, first, label, both, top);
      }
    }
    for (const Claim& each : top) take(image, index, each.anchor, each.overlap);
    if (p_.rule != kMit) {
      claim_without_metric(image, index, gt, top);
    } else if (top.kept() == 0) {
      claim_the_best(image, index, label, gt);
    }
  }

  // What is left of topk goes to the first anchors without a metric, of which those inside count.
  void claim_without_metric(int64_t image, int64_t index, const Shape& gt, const Top& top) const {
    int left = p_.topk - top.kept();
    for (int64_t a = 0; left > 0 && a < p_.topk; ++a) {
      const bool positive = std::any_of(top.begin(), top.end(), [&](const Claim& each) { return each.anchor == a; });
      if (positive) continue;
      --left;
      if (p_.may_learn(a, gt.box)) take(image, index, a, overlap(gt, predicted_[image * width_ + a]));
    }
  }

  // Rule "mit": a ground truth without a positive gets its best anchor, even one outside.
  void claim_the_best(int64_t image, int64_t index, int64_t label, const Shape& gt) const {
    Top best(1);
    alignas(64) float both[kLanes];
    for (int64_t first = 0; first < width_; first += kLanes) {
      const Columns::Lanes predicted(predicted_, image * width_ + first);
      for (int j = 0; j < kLanes; ++j) both[j] = overlap(gt, predicted[j]);
      for (int64_t a = p_.anchors; a < first + kLanes; ++a) both[a - first] = 0.0f;
      gather(image, first, label, both, best);
    }
    for (const Claim& each : best) take(image, index, each.anchor, each.overlap);
  }

  void take(int64_t image, int64_t index, int64_t anchor, float both) const {
    const std::atomic_ref<uint64_t> word(p_.words[image * p_.anchors + anchor]);
    const uint64_t key = key_of(both, index);
    uint64_t seen = word.load(std::memory_order_relaxed);
    while (!word.compare_exchange_weak(seen, with_claim(seen, key), std::memory_order_relaxed)) {
    }
  }

  static void raise_together(uint32_t* at, uint32_t value) {
    const std::atomic_ref<uint32_t> word(*at);
    uint32_t seen = word.load(std::memory_order_relaxed);
    while (seen < value && !word.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
    }
  }

  void resolve(int64_t image, int64_t anchor) const {
    const int64_t i = image * p_.anchors + anchor;
    const uint64_t word = p_.words[i];
    p_.weights[i] = 0.0f;
    if (word == 0) {
      p_.words[i] = ~uint64_t{0};  // -1 as gt_index
      return;
    }
    const Shape predicted = predicted_[image * width_ + anchor];
    const bool choose = p_.rule != kMit && (word & kContested) != 0;
    const int64_t index = choose ? highest_overlap(image, anchor, predicted) : index_of(word);
    const int64_t row = image * p_.count + index;
    p_.words[i] = static_cast<uint64_t>(index);
    const Shape gt = gt_boxes_[image * depth_ + index];
    if (p_.rule == kUltralytics && !(p_.mask[row] && p_.may_learn(anchor, gt.box))) return;
    const float both = overlap(gt, predicted);
    const float score = p_.score(image, anchor, p_.labels[row]);
    const float value = kPublished ? published_metric(score, both) : metric(score, both, p_.alpha, p_.beta);
    p_.weights[i] = value;
    raise_together(p_.best_metric + row, bits_of(value));
    raise_together(p_.best_overlap + row, bits_of(both));
  }

  int64_t highest_overlap(int64_t image, int64_t anchor, const Shape& predicted) const {
    int64_t best = 0;
    float highest = 0.0f;
    alignas(64) float both[kLanes];
    for (int64_t g = 0; g < depth_; g += kLanes) {
      const Columns::Lanes gt_boxes(gt_boxes_, image * depth_ + g);
      for (int j = 0; j < kLanes; ++j) both[j] = intersection(gt_boxes.box(j), predicted.box);
      if (positive_lanes(both) == 0) continue;
      for (int j = 0; j < kLanes; ++j) both[j] = overlap(gt_boxes[j], predicted);
      for (uint32_t lanes = lanes_where<Compare::kGreater>(both, highest); lanes != 0; lanes &= lanes - 1) {
        const int64_t j = __builtin_ctz(lanes), row = image * p_.count + g + j;
        if (!(both[j] > highest)) continue;
        if (p_.rule == kUltralytics && !(p_.mask[row] && p_.may_learn(anchor, gt_boxes.box(j)))) continue;
        highest = both[j];
        best = g + j;
      }
    }
    return best;
  }

  Problem<Score> p_;
  int64_t width_, depth_, chunks_;  // padded: anchors and ground truths of an image; groups of 16 anchors
  Columns predicted_, gt_boxes_;
  std::vector<float> x_, y_, reach_, chunk_sides_;
};

std::tuple<Tensor, Tensor> assign(const Tensor& scores, const Tensor& boxes, const Tensor& points, const Tensor& labels,
                                  const Tensor& gt_boxes, const Tensor& mask, const std::optional<Tensor>& sizes,
                                  int64_t topk, double alpha, double beta, int64_t rule) {
  const Arguments given(scores, boxes, points, labels, gt_boxes, mask, sizes, topk, alpha, beta, rule);
  if (given.nothing_to_do()) return given.all_background();
  dispatch(given.scores.scalar_type(), kOp, "scores", [&](auto score) {
    using Score = decltype(score);
    auto p = given.problem<Score>();
    std::vector<uint32_t> best(2 * p.batch * p.count);
    p.best_metric = best.data(), p.best_overlap = best.data() + p.batch * p.count;
    if (p.alpha.halves == 1 && p.beta.halves == 12) {
      Assigner<Score, true>(p).run();
    } else {
      Assigner<Score, false>(p).run();
    }
  });
  return {given.gt_index, given.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("assign", TORCH_BOX(&assign)); }
