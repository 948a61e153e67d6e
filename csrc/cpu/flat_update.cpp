// sgd_update and adam_update on the CPU: one pass over the flat buffers of a model. SGD reads 16 bytes per weight and
// writes 16, Adam 20 and 20. Each operation is rounded as torch's: `add` with alpha, `addcmul` and `lerp` are fused
// multiply-adds there, also at the end of a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/vector.h"

namespace {

using namespace yolov9_fast;

constexpr int64_t kGrain = 1 << 14;  // elements, about 10 us

float* values_of(const Tensor& tensor, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.is_contiguous(), op, ": ",
                  name, ": expected float32 [N], contiguous");
  STD_TORCH_CHECK(tensor.numel() == count, op, ": ", name, ": expected ", count, " elements, got ", tensor.numel());
  return static_cast<float*>(tensor.data_ptr());
}

// body(lanes, index) over [begin, end), a register at a time.
template <class Body>
void over(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes<float> <= end; i += kLanes<float>) body(AllLanes{}, i);
  if (i < end) body(FirstLanes{static_cast<int>(end - i)}, i);
}

// body(group's numbers, begin, end) for the groups' parts, in parallel. `numbers`: those of the first group.
template <class Body>
void over_groups(const float* numbers, int64_t each, const std::vector<int64_t>& ends, const Body& body) {
  torch::stable::parallel_for(0, ends.empty() ? 0 : ends.back(), kGrain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (size_t group = 0; group < ends.size(); ++group) {
      const int64_t from = std::max(begin, start), to = std::min(end, ends[group]);
      if (from < to) body(numbers + each * static_cast<int64_t>(group), from, to);
      start = ends[group];
    }
  });
}

const float* numbers_of(const Tensor& numbers, const std::vector<int64_t>& ends, int64_t shared, int64_t each,
                        int64_t count, const char* op) {
  STD_TORCH_CHECK(!ends.empty() && ends.front() >= 0 && std::is_sorted(ends.begin(), ends.end()) && ends.back() == count,
                  op, ": ends: expected ascending ends of groups up to ", count);
  return values_of(numbers, shared + each * static_cast<int64_t>(ends.size()), op, "numbers");
}

// e + w (p - e), from the end that is nearer.
struct Lerp {
  explicit Lerp(float weight) : from_end(!(std::abs(weight) < 0.5f)), factor(from_end ? weight - 1 : weight) {}
  Floats operator()(Floats start, Floats end) const {
    return multiply_add(broadcast(factor), end - start, from_end ? end : start);
  }
  bool from_end;
  float factor;
};

void sgd_update(const Tensor& parameters, const Tensor& gradients, const Tensor& momenta, const Tensor& averages,
                const Tensor& numbers, std::vector<int64_t> ends, bool nesterov) {
  constexpr char kOp[] = "sgd_update";
  const int64_t count = parameters.numel();
  float* const p = values_of(parameters, count, kOp, "parameters");
  float* const g = values_of(gradients, count, kOp, "gradients");
  float* const m = values_of(momenta, count, kOp, "momenta");
  float* const e = values_of(averages, count, kOp, "averages");
  const float* const given = numbers_of(numbers, ends, 3, 2, count, kOp);
  const float factor = given[0];
  const Lerp average(given[1]);
  const float momentum = given[2];
  over_groups(given + 3, 2, ends, [&](const float* own, int64_t begin, int64_t end) {
    const float rate = own[0], decay = own[1];
    if (factor == factor) {
      over(begin, end, [&](auto lanes, int64_t i) {
        const Floats weight = load(p + i, lanes);
        const Floats gradient = multiply_add(weight, broadcast(decay), load(g + i, lanes) * factor);
        const Floats velocity = load(m + i, lanes) * momentum + gradient;
        const Floats step = nesterov ? multiply_add(velocity, broadcast(momentum), gradient) : velocity;
        const Floats next = multiply_add(step, broadcast(-rate), weight);
        store(m + i, velocity, lanes);
        store(p + i, next, lanes);
        store(e + i, average(load(e + i, lanes), next), lanes);
      });
    }
    std::fill(g + begin, g + end, 0.0f);
  });
}

Floats square_root(Floats x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

void adam_update(const Tensor& parameters, const Tensor& gradients, const Tensor& first, const Tensor& second,
                 const Tensor& averages, const Tensor& numbers, std::vector<int64_t> ends, double epsilon,
                 bool decoupled) {
  constexpr char kOp[] = "adam_update";
  const int64_t count = parameters.numel();
  float* const p = values_of(parameters, count, kOp, "parameters");
  float* const g = values_of(gradients, count, kOp, "gradients");
  float* const m = values_of(first, count, kOp, "first");
  float* const v = values_of(second, count, kOp, "second");
  float* const e = values_of(averages, count, kOp, "averages");
  const float* const given = numbers_of(numbers, ends, 5, 3, count, kOp);
  const float factor = given[0];
  const Lerp average(given[1]), moment(given[2]);
  const float beta2 = given[3], rest = given[4], least = static_cast<float>(epsilon);
  over_groups(given + 5, 3, ends, [&](const float* own, int64_t begin, int64_t end) {
    const float size = own[0], decay = own[1], root = own[2];
    if (factor == factor) {
      over(begin, end, [&](auto lanes, int64_t i) {
        Floats weight = load(p + i, lanes);
        Floats gradient = load(g + i, lanes) * factor;
        if (decoupled) {
          weight = weight * decay;
        } else {
          gradient = multiply_add(weight, broadcast(decay), gradient);
        }
        const Floats mean = moment(load(m + i, lanes), gradient);
        const Floats squares = multiply_add(rest * gradient, gradient, load(v + i, lanes) * beta2);
        const Floats next = weight + (-size * mean) / (square_root(squares) / root + least);
        store(m + i, mean, lanes);
        store(v + i, squares, lanes);
        store(p + i, next, lanes);
        store(e + i, average(load(e + i, lanes), next), lanes);
      });
    }
    std::fill(g + begin, g + end, 0.0f);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("sgd_update", TORCH_BOX(&sgd_update));
  library.impl("adam_update", TORCH_BOX(&adam_update));
}
