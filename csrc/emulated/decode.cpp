// decode and decode_for_assignment on the host by the block algorithms of common/decode_block.h: for tests, which vary
// the number of threads and their order.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/decode_arguments.h"
#include "common/decode_block.h"
#include "emulated/host_block.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::decoding;

Tensor decode(const std::vector<Tensor>& maps, const std::vector<int64_t>& strides, int64_t threads, int64_t seed) {
  const HostBlock block(threads, seed);
  Tensor out;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
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

std::tuple<Tensor, Tensor, Tensor> decode_for_assignment(const std::vector<Tensor>& maps,
                                                         const std::optional<Tensor>& labels,
                                                         const std::vector<int64_t>& strides, int64_t threads,
                                                         int64_t seed) {
  const HostBlock block(threads, seed);
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
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

STABLE_TORCH_LIBRARY_FRAGMENT(yolov9_fast_emulated, library) {
  library.def("decode(Tensor[] maps, int[] strides, int threads, int seed) -> Tensor");
  library.def(
      "decode_for_assignment(Tensor[] maps, Tensor? labels, int[] strides, int threads, int seed) "
      "-> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(yolov9_fast_emulated, CPU, library) {
  library.impl("decode", TORCH_BOX(&decode));
  library.impl("decode_for_assignment", TORCH_BOX(&decode_for_assignment));
}
