// assign on the host by the block algorithms of common/assign_block.h: for tests, which vary the number of threads and
// the order of threads and blocks.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/assign_arguments.h"
#include "emulated/host_block.h"

namespace {

using namespace yolov9_fast::tal;
using namespace yolov9_fast;

std::tuple<Tensor, Tensor> assign(const Tensor& scores, const Tensor& boxes, const Tensor& points, const Tensor& labels,
                                  const Tensor& gt_boxes, const Tensor& mask, const std::optional<Tensor>& sizes,
                                  int64_t topk, double alpha, double beta, int64_t rule, int64_t threads,
                                  int64_t seed) {
  const Arguments given(scores, boxes, points, labels, gt_boxes, mask, sizes, topk, alpha, beta, rule);
  const HostBlock block(threads, seed, kMaxThreads);
  if (given.nothing_to_do()) return given.all_background();
  dispatch(given.scores.scalar_type(), kOp, "scores", [&](auto score) {
    auto p = given.problem<decltype(score)>();
    std::vector<float> chunks(4 * p.chunk_count());
    std::vector<uint32_t> best(2 * p.batch * p.count);
    p.chunks = chunks.data();
    p.best_metric = best.data(), p.best_overlap = best.data() + p.batch * p.count;
    const int64_t all = p.batch * p.anchors, rows = p.batch * p.count;
    for (int64_t i = 0; i < std::max({p.chunk_count(), all, rows}); ++i) prepare(p, i);
    ClaimShared of_claim{};
    for (const int64_t row : block_order(rows, seed)) claim(block, of_claim, p, row);
    ResolveShared of_resolve{};
    for (const int64_t b : block_order((all + threads - 1) / threads, seed)) {
      resolve(block, of_resolve, p, b * threads);
    }
    for (int64_t i = 0; i < all; ++i) weigh(p, i);
  });
  return {given.gt_index, given.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(yolov9_fast_emulated, library) {
  library.def(
      "assign(Tensor scores, Tensor boxes, Tensor anchor_points, Tensor gt_labels, Tensor gt_boxes, Tensor gt_mask, "
      "Tensor? sizes, int topk, float alpha, float beta, int rule, int threads, int seed) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(yolov9_fast_emulated, CPU, library) { library.impl("assign", TORCH_BOX(&assign)); }
