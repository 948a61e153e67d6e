// detection_loss on the host by the block algorithms of common/detection_loss_block.h: for tests, which vary the number
// of threads and their order.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/detection_loss_block.h"
#include "emulated/host_block.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::loss;

template <class T, class Real, bool kGradient>
void run(const Problem<T, Real>& p, const HostBlock& block) {
  SumShared<Real> shared;
  const bool focal = p.targets.options.focal_gamma > Real(0);
  for (int64_t i = 0; i < p.class_blocks(); ++i) {
    focal ? classes<T, Real, true, kGradient>(block, shared, p, i)
          : classes<T, Real, false, kGradient>(block, shared, p, i);
  }
  for (int64_t i = 0; i < p.anchor_blocks(); ++i) anchors<T, Real, kGradient>(block, shared, p, i);
}

// Without `upstream`: the items and, if asked for, their gradients; with it: the gradients of detection_loss_backward.
std::tuple<Tensor, std::vector<Tensor>> detection_loss(
    const std::optional<Tensor>& upstream, const std::vector<Tensor>& maps, const Tensor& gt_index,
    const Tensor& weight, const Tensor& gt_labels, const Tensor& gt_boxes, const Tensor& normaliser,
    const std::vector<int64_t>& strides, double pos_weight, double label_smoothing, double focal_gamma,
    const std::vector<double>& gains, bool gradient, int64_t threads, int64_t seed) {
  const Arguments given{maps,    gt_index,   weight,          gt_labels,   gt_boxes, normaliser,
                        strides, pos_weight, label_smoothing, focal_gamma, gains};
  Tensor items = torch::stable::new_empty(normaliser, {3});
  const std::vector<Tensor> gradients = gradient ? empty_maps(maps) : std::vector<Tensor>();
  const HostBlock block(threads, seed, kMaxThreads);
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    Problem<T, Real> p = problem_of<T, Real>(given, gradients, static_cast<int>(threads));
    std::vector<double> class_sums(p.class_blocks()), anchor_sums(3 * p.anchor_blocks());
    p.items = static_cast<Real*>(items.mutable_data_ptr());
    if (upstream.has_value()) {
      check_dense(*upstream, kScalarType<Real>, 3, "upstream");
      p.upstream = static_cast<const Real*>(upstream->const_data_ptr());
    }
    p.class_sums = class_sums.data();
    p.anchor_sums = anchor_sums.data();
    gradient ? run<T, Real, true>(p, block) : run<T, Real, false>(p, block);
    FinishShared shared;
    finish(block, shared, p);
  });
  return {items, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(yolov9_fast_emulated, library) {
  library.def(
      "detection_loss(Tensor? upstream, Tensor[] maps, Tensor gt_index, Tensor weight, Tensor gt_labels, "
      "Tensor gt_boxes, Tensor normaliser, int[] strides, float pos_weight, float label_smoothing, float focal_gamma, "
      "float[] gains, bool gradient, int threads, int seed) -> (Tensor, Tensor[])");
}
STABLE_TORCH_LIBRARY_IMPL(yolov9_fast_emulated, CPU, library) {
  library.impl("detection_loss", TORCH_BOX(&detection_loss));
}
