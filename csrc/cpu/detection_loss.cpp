// detection_loss on the CPU, in two sweeps: all class logits as background, vectorised where the map is dense (reads
// the maps' class channels once, writes the gradients once); then the few assigned anchors, whose terms are put in
// place. Sums run over pieces of fixed size and are added up in their order, so that threads change no bit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/detection_loss_arguments.h"
#include "cpu/rows.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::loss;

constexpr int64_t kRun = 512;            // logits at a time: a few KiB of buffers, well within the first cache
constexpr int64_t kPiece = 16384;        // logits of a task, about 10 us
constexpr int64_t kAnchorsOfTask = 512;  // anchors looked through by a task of the second sweep

// Rows of one image of one level; a row is the plane of a channel or the channels of a pixel.
struct Piece {
  int level;
  int64_t image, begin, end;
};

// Sixteen sums that vectorise, added at the end.
template <class Real>
double sum_of(const Real* values, int64_t count) {
  constexpr int kLanes = 16;
  Real lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  double sum = 0;
  for (const Real lane : lanes) sum += static_cast<double>(lane);
  for (; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

template <class Real, bool kFocal, bool kGradient>
double dense_run(const Real* __restrict logits, Real* __restrict gradients, int64_t count, Real gamma, Real scale) {
  Real values[kRun];
  for (int64_t i = 0; i < count; ++i) {
    const ValueAndGradient<Real> term = background_class<Real, kFocal>(logits[i], gamma);
    values[i] = term.value;
    if constexpr (kGradient) gradients[i] = term.gradient * scale;
  }
  return sum_of(values, count);
}

template <class T, class Real, bool kFocal, bool kGradient>
double background_run(const T* source, int64_t step, T* target, int64_t target_step, int64_t count, Real gamma,
                      Real scale) {
  if constexpr (std::is_same_v<T, Real>) {
    if (step == 1 && target_step == 1) return dense_run<Real, kFocal, kGradient>(source, target, count, gamma, scale);
  }
  Real logits[kRun], gradients[kRun];
  load_run(source, step, logits, count);
  const double sum = dense_run<Real, kFocal, kGradient>(logits, gradients, count, gamma, scale);
  if constexpr (kGradient) store_run(gradients, target, target_step, count);
  return sum;
}

template <class T>
void zero_run(T* target, int64_t step, int64_t count) {
  if (step == 1) {
    std::fill(target, target + count, T(0));
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * step] = T(0);
  }
}

// With few classes rows are short: then strided reads over the pixels are faster.
template <class T>
bool rows_are_pixels(const Level<T>& level, int64_t classes) {
  return level.at.channel == 1 && level.at.pixel != 1 && classes >= 16;
}

template <class T, class Real, bool kFocal, bool kGradient>
double background(const Level<T>& level, const Piece& piece, const Targets<Real>& targets, Real scale) {
  const bool by_pixel = rows_are_pixels(level, targets.classes);
  const int64_t row_step = by_pixel ? level.at.pixel : level.at.channel;
  const int64_t step = by_pixel ? level.at.channel : level.at.pixel;
  const int64_t gradient_row = by_pixel ? level.gradient_at.pixel : level.gradient_at.channel;
  const int64_t gradient_step = by_pixel ? level.gradient_at.channel : level.gradient_at.pixel;
  const int64_t columns = by_pixel ? targets.classes : level.pixels;
  const T* source = level.data + piece.image * level.at.image;
  T* target = kGradient ? level.gradient + piece.image * level.gradient_at.image : nullptr;
  double sum = 0;
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const T* from = source + row * row_step;
    T* to = kGradient ? target + row * gradient_row : nullptr;
    if (by_pixel) {
      if constexpr (kGradient) {
        zero_run(to, gradient_step, kBoxChannels);
        to += kBoxChannels * gradient_step;
      }
      from += kBoxChannels * step;
    } else if (row < kBoxChannels) {
      if constexpr (kGradient) zero_run(to, gradient_step, columns);
      continue;
    }
    for (int64_t i = 0; i < columns; i += kRun) {
      sum +=
          background_run<T, Real, kFocal, kGradient>(from + i * step, step, to + i * gradient_step, gradient_step,
                                                     std::min(kRun, columns - i), targets.options.focal_gamma, scale);
    }
  }
  return sum;
}

// Not inlined, so that the scan over the anchors, nearly all background, stays small.
template <class T, class Real, bool kGradient>
__attribute__((noinline)) void add_assigned(const Level<T>& level, int64_t image, int64_t pixel, int64_t gt, Real w,
                                            const Targets<Real>& targets, const Scales<Real>& scales,
                                            Sums<double>& sums) {
  STD_TORCH_CHECK(gt < targets.gt_count, kOp, ": gt_index: expected less than ", targets.gt_count, ", got ", gt);
  const int64_t row = image * targets.gt_count + gt, label = targets.labels[row];
  STD_TORCH_CHECK(label >= 0 && label < targets.classes, kOp, ": gt_labels: expected values in [0, ", targets.classes,
                  "), got ", label);
  const Sums<Real> own = assigned_anchor<T, Real, kGradient>(level, image, pixel, row, label, w, targets, scales);
  sums.box += static_cast<double>(own.box);
  sums.cls += static_cast<double>(own.cls);
  sums.dfl += static_cast<double>(own.dfl);
}

template <class T, class Real, bool kGradient>
Sums<double> sweep(const Levels<T>& maps, const Targets<Real>& targets, const Scales<Real>& scales) {
  std::vector<Piece> pieces, anchors;
  for (int l = 0; l < maps.count; ++l) {
    const Level<T>& level = maps.level[l];
    const bool by_pixel = rows_are_pixels(level, targets.classes);
    const int64_t rows = by_pixel ? level.pixels : maps.channels;
    const int64_t columns = by_pixel ? targets.classes : level.pixels;
    const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, columns));
    for (int64_t image = 0; image < maps.batch; ++image) {
      for (int64_t row = 0; row < rows; row += step) pieces.push_back({l, image, row, std::min(rows, row + step)});
      for (int64_t pixel = 0; pixel < level.pixels; pixel += kAnchorsOfTask) {
        anchors.push_back({l, image, pixel, std::min(level.pixels, pixel + kAnchorsOfTask)});
      }
    }
  }
  std::vector<double> class_sums(pieces.size());
  const bool focal = targets.options.focal_gamma > Real(0);
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Level<T>& level = maps.level[pieces[i].level];
      class_sums[i] = focal ? background<T, Real, true, kGradient>(level, pieces[i], targets, scales.cls)
                            : background<T, Real, false, kGradient>(level, pieces[i], targets, scales.cls);
    }
  });
  std::vector<Sums<double>> anchor_sums(anchors.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(anchors.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = anchors[i];
      const Level<T>& level = maps.level[piece.level];
      const int64_t offset = piece.image * maps.anchors + level.first_anchor;
      for (int64_t pixel = piece.begin; pixel < piece.end; ++pixel) {
        const int64_t gt = targets.gt_index[offset + pixel];
        if (gt < 0) continue;
        add_assigned<T, Real, kGradient>(level, piece.image, pixel, gt, targets.weight[offset + pixel], targets, scales,
                                         anchor_sums[i]);
      }
    }
  });
  Sums<double> total{};
  for (const double sum : class_sums) total.cls += sum;
  for (const Sums<double>& sum : anchor_sums) {
    total.box += sum.box;
    total.cls += sum.cls;
    total.dfl += sum.dfl;
  }
  return total;
}

// items: null, or where the three go; `upstream`: null for ones.
template <class T, class Real>
void run(const Arguments& given, const std::vector<Tensor>& gradients, const Real* upstream, Real* items) {
  const Levels<T> levels = given.levels<T>(gradients);
  const Targets<Real> targets = given.targets<Real>(levels.batch, levels.channels, levels.anchors);
  const double normaliser = static_cast<const Real*>(given.normaliser.const_data_ptr())[0];
  Real scales[3];
  for (int i = 0; i < 3; ++i) {
    const double incoming = upstream == nullptr ? 1.0 : static_cast<double>(upstream[i]);
    scales[i] = static_cast<Real>(given.gains[i] / normaliser * incoming);
  }
  const Scales<Real> of_terms{scales[1], {scales[0], scales[2]}};
  const Sums<double> sums = gradients.empty() ? sweep<T, Real, false>(levels, targets, of_terms)
                                              : sweep<T, Real, true>(levels, targets, of_terms);
  if (items == nullptr) return;
  items[0] = static_cast<Real>(sums.box * given.gains[0] / normaliser);
  items[1] = static_cast<Real>(sums.cls * given.gains[1] / normaliser);
  items[2] = static_cast<Real>(sums.dfl * given.gains[2] / normaliser);
}

std::tuple<Tensor, std::vector<Tensor>> detection_loss_forward(const std::vector<Tensor>& maps, const Tensor& gt_index,
                                                               const Tensor& weight, const Tensor& gt_labels,
                                                               const Tensor& gt_boxes, const Tensor& normaliser,
                                                               const std::vector<int64_t>& strides, double pos_weight,
                                                               double label_smoothing, double focal_gamma,
                                                               const std::vector<double>& gains, bool gradient) {
  const Arguments given{maps,    gt_index,   weight,          gt_labels,   gt_boxes, normaliser,
                        strides, pos_weight, label_smoothing, focal_gamma, gains};
  Tensor items = torch::stable::new_empty(normaliser, {3});
  std::vector<Tensor> gradients = gradient ? empty_maps(maps) : std::vector<Tensor>();
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    STD_TORCH_CHECK(items.scalar_type() == kScalarType<Real>, kOp,
                    ": normaliser: expected the dtype of the computation");
    run<T, Real>(given, gradients, nullptr, static_cast<Real*>(items.mutable_data_ptr()));
  });
  return {items, gradients};
}

std::vector<Tensor> detection_loss_backward(const Tensor& upstream, const std::vector<Tensor>& maps,
                                            const Tensor& gt_index, const Tensor& weight, const Tensor& gt_labels,
                                            const Tensor& gt_boxes, const Tensor& normaliser,
                                            const std::vector<int64_t>& strides, double pos_weight,
                                            double label_smoothing, double focal_gamma,
                                            const std::vector<double>& gains) {
  const Arguments given{maps,    gt_index,   weight,          gt_labels,   gt_boxes, normaliser,
                        strides, pos_weight, label_smoothing, focal_gamma, gains};
  const std::vector<Tensor> gradients = empty_maps(maps);
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    check_dense(upstream, kScalarType<Real>, 3, "upstream");
    run<T, Real>(given, gradients, static_cast<const Real*>(upstream.const_data_ptr()), nullptr);
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("detection_loss_forward", TORCH_BOX(&detection_loss_forward));
  library.impl("detection_loss_backward", TORCH_BOX(&detection_loss_backward));
}
