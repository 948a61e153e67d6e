// nms on the CPU: images in parallel. Per image one pass over the scores keeps the candidates and counts them by the
// leading bits of their score; a second pass follows only if they are more than max_candidates, with a threshold that
// drops the rest. The candidates are then in buckets of descending score, which are sorted one by one, as far as
// max_det needs them. Reads 4·(4 + nc)·A bytes an image, twice where it cuts.
#include "common/nms.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/nms_arguments.h"
#include "cpu/kept_boxes.h"
#include "cpu/sort_keys.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using namespace yolov9_fast;

struct Options {
  float conf, iou;
  bool multi_label, agnostic;
  std::vector<uint8_t> wanted;  // by class
  int64_t max_det, max_candidates;
};

struct Image {
  const float* data;
  int64_t channel;  // elements from one channel to the next
  int64_t classes, anchors;

  const float* row(int64_t index) const { return data + index * channel; }
  const float* scores(int64_t label) const { return row(4 + label); }
};

struct Result {
  float* boxes;     // [max_det, 6], zeroed
  int64_t* anchor;  // [max_det], all −1
  int64_t count, candidates;
};

uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

float value_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Positions i with limits[i] < scores[i] < infinity, and the bits of their scores; both outputs have room for `count`.
int64_t scan(const float* scores, const float* limits, int64_t count, uint32_t* bits, uint32_t* positions) {
  int64_t found = 0, i = 0;
#ifdef __AVX512F__
  const __m512 largest = _mm512_set1_ps(FLT_MAX);
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Each store writes a full vector: it stays inside because found ≤ i.
  for (; i + 16 <= count; i += 16) {
    const __m512 score = _mm512_loadu_ps(scores + i);
    __mmask16 good = _mm512_cmp_ps_mask(score, _mm512_loadu_ps(limits + i), _CMP_GT_OQ);
    if (good) {
      good = _mm512_mask_cmp_ps_mask(good, score, largest, _CMP_LE_OQ);
      _mm512_storeu_si512(bits + found, _mm512_maskz_compress_epi32(good, _mm512_castps_si512(score)));
      _mm512_storeu_si512(positions + found, _mm512_maskz_compress_epi32(good, lanes));
      found += __builtin_popcount(good);
    }
    lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16));
  }
#endif
  for (; i < count; ++i) {
    bits[found] = bits_of(scores[i]);
    positions[found] = static_cast<uint32_t>(i);
    found += scores[i] > limits[i] && scores[i] <= FLT_MAX;
  }
  return found;
}

class Search {
 public:
  Search(const Image& image, const Options& options)
      : image_(image),
        options_(options),
        corners_(image.anchors),
        limits_(image.anchors),
        row_bits_(image.anchors),
        row_anchors_(image.anchors) {}

  void run(Result& result) {
    read_boxes();
    collect();
    result.candidates = total_;
    if (total_ == 0) return;
    cut();
    arrange();
    result.count = suppress(result);
  }

 private:
  // 256 buckets to a factor of two in score.
  static constexpr int kBucketShift = 15;
  static constexpr uint32_t kInfinity = 0x7F800000u;

  void read_boxes() {
    const float *x = image_.row(0), *y = image_.row(1), *width = image_.row(2), *height = image_.row(3);
    for (int64_t i = 0; i < image_.anchors; ++i) {
      corners_[i] = corners(x[i], y[i], width[i], height[i]);
      // No score is above infinity, so the scan skips anchors whose box is not finite.
      limits_[i] = is_finite(corners_[i]) ? options_.conf : std::numeric_limits<float>::infinity();
    }
    lowest_ = bits_of(options_.conf + 0.0f) >> kBucketShift;
  }

  // Calls use(bits, indices, count) for candidates above `limits_`; index = anchor · classes + class.
  template <class Use>
  void visit(Use&& use) {
    if (!options_.multi_label) {
      const int64_t found = scan(best_.data(), limits_.data(), image_.anchors, row_bits_.data(), row_anchors_.data());
      int64_t count = 0;
      for (int64_t i = 0; i < found; ++i) {
        const uint32_t anchor = row_anchors_[i], label = best_label_[anchor];
        row_bits_[count] = row_bits_[i];
        row_anchors_[count] = anchor * static_cast<uint32_t>(image_.classes) + label;
        count += options_.wanted[label];
      }
      use(row_bits_.data(), row_anchors_.data(), count);
      return;
    }
    for (int64_t label = 0; label < image_.classes; ++label) {
      if (!options_.wanted[label]) continue;
      const int64_t found =
          scan(image_.scores(label), limits_.data(), image_.anchors, row_bits_.data(), row_anchors_.data());
      for (int64_t i = 0; i < found; ++i) {
        row_anchors_[i] = row_anchors_[i] * static_cast<uint32_t>(image_.classes) + static_cast<uint32_t>(label);
      }
      use(row_bits_.data(), row_anchors_.data(), found);
    }
  }

  // The best finite score of every anchor and its class, the first of equal ones.
  void find_best() {
    best_.assign(image_.anchors, -1.0f);
    best_label_.assign(image_.anchors, 0);
    constexpr int64_t kBlock = 2048;  // scores and classes of a block stay in the first-level cache
    for (int64_t begin = 0; begin < image_.anchors; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, image_.anchors);
      for (int64_t label = 0; label < image_.classes; ++label) {
        const float* scores = image_.scores(label);
        for (int64_t i = begin; i < end; ++i) {
          const bool better = (scores[i] > best_[i]) & (scores[i] <= FLT_MAX);
          best_[i] = better ? scores[i] : best_[i];
          best_label_[i] = better ? static_cast<uint32_t>(label) : best_label_[i];
        }
      }
    }
  }

  void store(const uint32_t* bits, const uint32_t* indices, int64_t count) {
    bits_.insert(bits_.end(), bits, bits + count);
    indices_.insert(indices_.end(), indices, indices + count);
  }

  void collect() {
    if (!options_.multi_label) find_best();
    buckets_.assign((kInfinity >> kBucketShift) - lowest_ + 1, 0);
    bits_.clear();
    indices_.clear();
    bool storing = true;
    visit([&](const uint32_t* bits, const uint32_t* indices, int64_t count) {
      for (int64_t i = 0; i < count; ++i) ++buckets_[(bits[i] >> kBucketShift) - lowest_];
      total_ += count;
      storing = storing && total_ <= options_.max_candidates;
      if (storing) store(bits, indices, count);
    });
  }

  // Where there are too many: leave the buckets from which none can be among the best, and collect the others again.
  void cut() {
    if (total_ <= options_.max_candidates) return;
    int64_t bucket = static_cast<int64_t>(buckets_.size()), sum = 0;
    while (sum < options_.max_candidates) sum += buckets_[--bucket];
    std::fill(buckets_.begin(), buckets_.begin() + bucket, 0);
    const uint32_t first = static_cast<uint32_t>(bucket + lowest_) << kBucketShift;
    if (first > bits_of(options_.conf + 0.0f)) {
      const float below = value_of(first - 1);
      for (float& limit : limits_) limit = limit > below ? limit : below;
    }
    bits_.clear();
    indices_.clear();
    bits_.reserve(sum);
    indices_.reserve(sum);
    visit([&](const uint32_t* bits, const uint32_t* indices, int64_t count) { store(bits, indices, count); });
  }

  // Keys by bucket, descending; unordered within a bucket.
  void arrange() {
    keys_.resize(bits_.size());
    starts_.resize(buckets_.size());
    uint32_t sum = 0;
    for (int64_t bucket = static_cast<int64_t>(buckets_.size()) - 1; bucket >= 0; --bucket) {
      starts_[bucket] = sum;
      sum += buckets_[bucket];
    }
    for (size_t i = 0; i < bits_.size(); ++i) {
      keys_[starts_[(bits_[i] >> kBucketShift) - lowest_]++] = candidate_key(bits_[i], indices_[i]);
    }
  }

  int64_t suppress(Result& result) {
    KeptBoxes kept(options_.agnostic ? 1 : image_.classes, options_.iou);
    const int64_t limit = std::min<int64_t>(options_.max_candidates, static_cast<int64_t>(keys_.size()));
    int64_t begin = 0, count = 0;
    for (int64_t bucket = static_cast<int64_t>(buckets_.size()) - 1; begin < limit; --bucket) {
      const int64_t size = buckets_[bucket];
      if (size == 0) continue;
      sort_keys(keys_.data() + begin, size, scratch_);
      const int64_t end = std::min(begin + size, limit);
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t index = index_of_key(keys_[i]), classes = static_cast<uint32_t>(image_.classes);
        const uint32_t anchor = index / classes, label = index % classes;
        const Corners box = corners_[anchor];
        const float area = signed_area(box);
        const uint32_t group = options_.agnostic ? 0 : label;
        if (kept.suppress(group, box, area)) continue;
        kept.add(group, box, area);
        float* row = result.boxes + 6 * count;
        row[0] = box.x1;
        row[1] = box.y1;
        row[2] = box.x2;
        row[3] = box.y2;
        row[4] = value_of(rank_of_key(keys_[i]));
        row[5] = static_cast<float>(label);
        result.anchor[count] = anchor;
        if (++count == options_.max_det) return count;
      }
      begin += size;
    }
    return count;
  }

  const Image& image_;
  const Options& options_;
  std::vector<Corners> corners_;
  std::vector<float> limits_, best_;
  std::vector<uint32_t> best_label_, row_bits_, row_anchors_;
  uint32_t lowest_ = 0;
  int64_t total_ = 0;
  std::vector<uint32_t> buckets_, starts_, bits_, indices_;
  std::vector<uint64_t> keys_, scratch_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> nms(const Tensor& prediction, double conf, double iou, bool multi_label,
                                               bool agnostic, std::optional<std::vector<int64_t>> classes,
                                               int64_t max_det, int64_t max_candidates) {
  check_nms(prediction, conf, iou, max_det, max_candidates);
  const int64_t images = prediction.size(0), labels = prediction.size(1) - 4, anchors = prediction.size(2);
  Options options{static_cast<float>(conf),
                  static_cast<float>(iou),
                  multi_label,
                  agnostic,
                  std::vector<uint8_t>(labels, !classes.has_value()),
                  max_det,
                  max_candidates};
  if (classes) {
    for (const int64_t label : *classes) {
      STD_TORCH_CHECK(label >= 0 && label < labels, "nms: classes: expected values in [0, ", labels, "), got ", label);
      options.wanted[label] = 1;
    }
  }
  Tensor boxes = torch::stable::new_zeros(prediction, {images, max_det, 6});
  Tensor count = torch::stable::new_zeros(prediction, {images}, ScalarType::Long);
  Tensor candidates = torch::stable::new_zeros(prediction, {images}, ScalarType::Long);
  Tensor anchor = torch::stable::new_empty(prediction, {images, max_det}, ScalarType::Long);
  const float* data = static_cast<const float*>(prediction.const_data_ptr());
  float* box_rows = static_cast<float*>(boxes.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  int64_t* totals = static_cast<int64_t*>(candidates.mutable_data_ptr());
  int64_t* anchor_rows = static_cast<int64_t*>(anchor.mutable_data_ptr());
  std::fill_n(anchor_rows, images * max_det, int64_t{-1});
  if (anchors == 0) return {boxes, count, candidates, anchor};
  const int64_t image_stride = prediction.stride(0), channel = prediction.stride(1);
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Image image{data + i * image_stride, channel, labels, anchors};
      Result result{box_rows + i * max_det * 6, anchor_rows + i * max_det, 0, 0};
      Search(image, options).run(result);
      counts[i] = result.count;
      totals[i] = result.candidates;
    }
  });
  return {boxes, count, candidates, anchor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("nms", TORCH_BOX(&nms)); }
