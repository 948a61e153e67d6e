// The thread block of common/block.h on the host: its threads run one after the other, in an order that tests vary.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "common/block.h"

namespace yolov9_fast {

template <class Value>
void shuffle(std::vector<Value>& values, std::minstd_rand& random) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random() % i]);
}

// The blocks of a grid, ascending for seed 0, else shuffled: a GPU promises no order.
inline std::vector<int64_t> block_order(int64_t count, int64_t seed) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::minstd_rand random(static_cast<uint32_t>(seed));
  if (seed != 0) shuffle(order, random);
  return order;
}

class HostBlock {
 public:
  // seed 0: the threads in ascending order; else in another order in every phase.
  HostBlock(int64_t threads, int64_t seed, int64_t most = 1024)
      : shuffled_(seed != 0), random_(static_cast<uint32_t>(seed)) {
    STD_TORCH_CHECK(threads >= 1 && threads <= most, "threads: expected a value in [1, ", most, "], got ", threads);
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
  }

  int threads() const { return static_cast<int>(order_.size()); }

  template <class Body>
  void phase(Body&& body) const {
    if (shuffled_) shuffle(order_, random_);
    for (const int thread : order_) body(thread);
  }

 private:
  mutable std::vector<int> order_;
  bool shuffled_;
  mutable std::minstd_rand random_;
};

template <class Value>
class PerThread<Value, HostBlock> {
 public:
  explicit PerThread(const HostBlock& block) : values_(block.threads()) {}
  Value& operator[](int thread) { return values_[thread]; }

 private:
  std::vector<Value> values_;
};

}  // namespace yolov9_fast
