// assign by the GPU's phases, thread by thread on the host: for tests, which vary the threads, their order and the blocks'.
#include "common/assign_arguments.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace {

using namespace yolov9_fast::tal;
using yolov9_fast::HostBlock;

// The numbers below `count` in order for seed 0, else shuffled: blocks of a grid come in no order.
std::vector<int64_t> order(int64_t count, uint32_t seed) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::minstd_rand random(seed);
  for (size_t i = numbers.size(); seed != 0 && i > 1; --i) std::swap(numbers[i - 1], numbers[random() % i]);
  return numbers;
}

std::tuple<Tensor, Tensor> assign_phases(const Tensor& scores, const Tensor& boxes, const Tensor& points,
                                         const Tensor& labels, const Tensor& truths, const Tensor& mask,
                                         const std::optional<Tensor>& strides, int64_t topk, double alpha, double beta,
                                         int64_t rule, int64_t threads, int64_t seed) {
  const Arguments given(scores, boxes, points, labels, truths, mask, strides, topk, alpha, beta, rule);
  STD_TORCH_CHECK(threads >= 1 && threads <= kMaxThreads, "assign_phases: threads must lie in [1, ", kMaxThreads, "]");
  if (given.nothing_to_do()) return given.all_background();
  given.with_score_type([&](auto score) {
    auto p = given.problem<decltype(score)>();
    std::vector<float> chunks(4 * p.chunk_count());
    std::vector<uint32_t> best(2 * p.batch * p.count);
    p.chunks = chunks.data();
    p.best_metric = best.data(), p.best_overlap = best.data() + p.batch * p.count;
    const int64_t all = p.batch * p.anchors, rows = p.batch * p.count;
    const HostBlock block(static_cast<int>(threads), static_cast<uint32_t>(seed));
    for (int64_t i = 0; i < std::max({p.chunk_count(), all, rows}); ++i) prepare(p, i);
    ClaimShared of_claim{};
    for (const int64_t row : order(rows, static_cast<uint32_t>(seed))) claim(block, of_claim, p, row);
    ResolveShared of_resolve{};
    for (const int64_t b : order((all + threads - 1) / threads, static_cast<uint32_t>(seed))) {
      resolve(block, of_resolve, p, b * threads);
    }
    for (int64_t i = 0; i < all; ++i) weigh(p, i);
  });
  return {given.gt_index, given.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("assign_phases", TORCH_BOX(&assign_phases)); }
