// decode by the GPU's phases, thread by thread on the host: for tests, which vary the threads and their order.
#include "common/decode_arguments.h"
#include "common/decode_phases.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::decoding;

HostBlock block_of(int64_t threads, int64_t seed) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "decode_phases: threads must lie in [1, 1024]");
  return HostBlock(static_cast<int>(threads), static_cast<uint32_t>(seed));
}

Tensor decode_phases(const std::vector<Tensor>& maps, const std::vector<int64_t>& strides, int64_t threads,
                     int64_t seed) {
  const HostBlock block = block_of(threads, seed);
  Tensor out;
  dispatch(maps, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    Problem<T, Real> p{};
    p.maps = raw_maps<T>(maps, {}, strides, kOp);
    out = decoded<T, Real>(maps, p.maps);
    p.out = data_of<Real>(out);
    Shared<Real> shared;
    for (int64_t i = 0; i < p.blocks(); ++i) decode_block(block, shared, p, i);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> decode_for_assignment_phases(const std::vector<Tensor>& maps,
                                                                const std::optional<Tensor>& labels,
                                                                const std::vector<int64_t>& strides, int64_t threads,
                                                                int64_t seed) {
  const HostBlock block = block_of(threads, seed);
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch(maps, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    Problem<T, Real> p{};
    p.maps = raw_maps<T>(maps, {}, strides, kOp);
    const ForAssignment<Real> wanted(maps, p.maps, labels);
    p.scores = data_of<Real>(wanted.scores);
    p.boxes = data_of<Real>(wanted.boxes);
    p.points = data_of<Real>(wanted.points);
    p.labels = wanted.labels;
    p.rows = wanted.rows;
    Shared<Real> shared;
    for (int64_t i = 0; i < p.blocks(); ++i) assignment_block(block, shared, p, i);
    results = wanted.results();
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("decode_phases", TORCH_BOX(&decode_phases));
  library.impl("decode_for_assignment_phases", TORCH_BOX(&decode_for_assignment_phases));
}
