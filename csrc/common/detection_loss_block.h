// detection_loss on the GPU, as phases between barriers that also run on the host. Three launches:
//   classes   every class logit as background, zeros for the bins' gradients; reads each class logit once and writes
//             each gradient once, in the order of memory
//   anchors   a thread per anchor: terms and gradients of the assigned ones, put in the place of the background's
//   finish    one block: the sums of all blocks, in their order
// Sums are float within a block and double over the blocks; no atomics, so every run gives the same bits.
#pragma once

#include "common/block.h"
#include "common/detection_loss_arguments.h"

namespace yolov9_fast::loss {

constexpr int kMaxThreads = 256;
constexpr int kPerThread = 16;  // logits: enough loads under way to hide the memory's latency

template <class T, class Real>
struct Problem {
  Levels<T> maps;
  Targets<Real> targets;
  double gains[3];
  const Real* normaliser;
  const Real* upstream;  // three, or null for ones
  bool unless_ones;      // leave the gradients where upstream is ones
  int threads;           // of a block
  double* class_sums;    // per block of `classes`; null where no value is asked for
  double* anchor_sums;   // three per block of `anchors`
  Real* items;

  YF_HOST_DEVICE int64_t per_block() const { return static_cast<int64_t>(threads) * kPerThread; }

  YF_HOST_DEVICE int64_t blocks_of(int level) const {
    return (maps.channels * maps.level[level].pixels + per_block() - 1) / per_block();
  }

  YF_HOST_DEVICE int64_t class_blocks() const {
    int64_t blocks = 0;
    for (int l = 0; l < maps.count; ++l) blocks += blocks_of(l);
    return blocks * maps.batch;
  }

  YF_HOST_DEVICE int64_t anchor_blocks() const { return (maps.batch * maps.anchors + threads - 1) / threads; }

  YF_HOST_DEVICE bool nothing_to_do() const {
    return unless_ones && upstream[0] == Real(1) && upstream[1] == Real(1) && upstream[2] == Real(1);
  }

  YF_HOST_DEVICE Real scale(int item) const {
    const double incoming = upstream == nullptr ? 1.0 : static_cast<double>(upstream[item]);
    return static_cast<Real>(gains[item] / static_cast<double>(*normaliser) * incoming);
  }
};

template <class Real>
struct SumShared {
  Real sum[3][kMaxThreads];
  Scales<Real> scales;
  bool stop;
};

struct FinishShared {
  double sum[3][kMaxThreads];
};

// sum[i][0] becomes the sum over the threads, in a tree whose shape depends on their number alone.
template <class Value, class Block>
YF_BLOCK void add_up(const Block& block, Value (*sum)[kMaxThreads], int count) {
  int width = 1;
  while (width < block.threads()) width *= 2;
  for (width /= 2; width > 0; width /= 2) {
    block.phase([&](int t) {
      if (t >= width || t + width >= block.threads()) return;
      for (int i = 0; i < count; ++i) sum[i][t] += sum[i][t + width];
    });
  }
}

template <class T, class Real, bool kFocal, bool kGradient, class Block>
YF_BLOCK void classes(const Block& block, SumShared<Real>& shared, const Problem<T, Real>& p, int64_t index) {
  block.phase([&](int t) {
    if (t != 0) return;
    shared.stop = p.nothing_to_do();
    shared.scales.cls = p.scale(1);
  });
  if (shared.stop) return;
  int l = 0;
  while (index >= p.blocks_of(l) * p.maps.batch) index -= p.blocks_of(l++) * p.maps.batch;
  const Level<T>& level = p.maps.level[l];
  const int64_t image = index / p.blocks_of(l), first = index % p.blocks_of(l) * p.per_block();
  const bool by_channel = level.at.channel == 1 && level.at.pixel != 1;
  const int64_t fast = by_channel ? p.maps.channels : level.pixels, slow = by_channel ? level.pixels : p.maps.channels;
  const T* source = level.data + image * level.at.image;
  T* gradient = kGradient ? level.gradient + image * level.gradient_at.image : nullptr;
  const int64_t step_slow = p.threads / fast, step_fast = p.threads % fast;
  block.phase([&](int t) {
    Real sum = Real(0);
    int64_t f = (first + t) % fast, s = (first + t) / fast;
    for (int k = 0; k < kPerThread && s < slow; ++k) {
      const int64_t c = by_channel ? f : s, pixel = by_channel ? s : f;
      Real slope = Real(0);
      if (c >= kBoxChannels) {
        const Real logit = static_cast<Real>(source[c * level.at.channel + pixel * level.at.pixel]);
        const ValueAndGradient<Real> term = background_class<Real, kFocal>(logit, p.targets.options.focal_gamma);
        sum += term.value;
        slope = term.gradient * shared.scales.cls;
      }
      if constexpr (kGradient) {
        gradient[c * level.gradient_at.channel + pixel * level.gradient_at.pixel] = static_cast<T>(slope);
      }
      f += step_fast;
      s += step_slow;
      if (f >= fast) {
        f -= fast;
        ++s;
      }
    }
    shared.sum[0][t] = sum;
  });
  if (p.class_sums == nullptr) return;
  add_up(block, shared.sum, 1);
  int64_t before = 0;
  for (int other = 0; other < l; ++other) before += p.blocks_of(other) * p.maps.batch;
  block.phase([&](int t) {
    if (t == 0) p.class_sums[before + index] = static_cast<double>(shared.sum[0][0]);
  });
}

template <class T, class Real, bool kGradient, class Block>
YF_BLOCK void anchors(const Block& block, SumShared<Real>& shared, const Problem<T, Real>& p, int64_t index) {
  block.phase([&](int t) {
    if (t != 0) return;
    shared.stop = p.nothing_to_do();
    shared.scales = {p.scale(1), {p.scale(0), p.scale(2)}};
  });
  if (shared.stop) return;
  block.phase([&](int t) {
    Sums<Real> sums{Real(0), Real(0), Real(0)};
    const int64_t i = index * p.threads + t;
    const int64_t gt = i < p.maps.batch * p.maps.anchors ? p.targets.gt_index[i] : -1;
    if (gt >= 0) {
      const int64_t image = i / p.maps.anchors, anchor = i % p.maps.anchors;
      const int64_t row = image * p.targets.gt_count + gt;
      const int64_t label = gt < p.targets.gt_count ? p.targets.labels[row] : -1;
      if (label >= 0 && label < p.targets.classes) {
        int l = 0;
        while (l + 1 < p.maps.count && anchor >= p.maps.level[l + 1].first_anchor) ++l;
        const Level<T>& level = p.maps.level[l];
        sums = assigned_anchor<T, Real, kGradient>(level, image, anchor - level.first_anchor, row, label,
                                                   p.targets.weight[i], p.targets, shared.scales);
      } else {
        // No way to raise an error from here: an index out of range makes the loss NaN.
        sums = {Real(NAN), Real(NAN), Real(NAN)};
      }
    }
    shared.sum[0][t] = sums.box;
    shared.sum[1][t] = sums.cls;
    shared.sum[2][t] = sums.dfl;
  });
  if (p.anchor_sums == nullptr) return;
  add_up(block, shared.sum, 3);
  block.phase([&](int t) {
    if (t < 3) p.anchor_sums[3 * index + t] = static_cast<double>(shared.sum[t][0]);
    if (t == 0 && p.threads < 3) {
      for (int i = p.threads; i < 3; ++i) p.anchor_sums[3 * index + i] = static_cast<double>(shared.sum[i][0]);
    }
  });
}

template <class T, class Real, class Block>
YF_BLOCK void finish(const Block& block, FinishShared& shared, const Problem<T, Real>& p) {
  block.phase([&](int t) {
    double box = 0, cls = 0, dfl = 0;
    for (int64_t i = t; i < p.class_blocks(); i += p.threads) cls += p.class_sums[i];
    for (int64_t i = t; i < p.anchor_blocks(); i += p.threads) {
      box += p.anchor_sums[3 * i];
      cls += p.anchor_sums[3 * i + 1];
      dfl += p.anchor_sums[3 * i + 2];
    }
    shared.sum[0][t] = box;
    shared.sum[1][t] = cls;
    shared.sum[2][t] = dfl;
  });
  add_up(block, shared.sum, 3);
  block.phase([&](int t) {
    if (t != 0) return;
    for (int i = 0; i < 3; ++i) {
      p.items[i] = static_cast<Real>(shared.sum[i][0] * p.gains[i] / static_cast<double>(*p.normaliser));
    }
  });
}

// The problem of a call; where the block sums and the items go is filled in by whoever launches.
template <class T, class Real>
Problem<T, Real> problem_of(const Arguments& given, const std::vector<Tensor>& gradients, int threads) {
  Problem<T, Real> p{};
  p.maps = given.levels<T>(gradients);
  p.targets = given.targets<Real>(p.maps.batch, p.maps.channels, p.maps.anchors);
  for (int i = 0; i < 3; ++i) p.gains[i] = given.gains[i];
  p.normaliser = static_cast<const Real*>(given.normaliser.const_data_ptr());
  p.threads = threads;
  return p;
}

}  // namespace yolov9_fast::loss
