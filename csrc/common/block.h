// A block of threads as an execution policy: an algorithm written as phases between barriers runs on the GPU and, thread
// by thread, on the host, where tests hold it against the reference without a GPU.
//
//   template <class Block> YF_BLOCK void sum(const Block& block, Shared& shared, ...) {
//     PerThread<float, Block> mine(block);                    // what a thread keeps from phase to phase (registers)
//     block.phase([&](int t) { mine[t] = ...; });             // every thread runs it; then a barrier
//     block.phase([&](int t) { shared.sum[t] = mine[t]; });   // shared memory: an object that the caller owns
//   }
//
// Within a phase no thread may read what another writes: on the host the threads run one after the other, in an order
// that tests vary. Values that decide which phases follow must be the same for all threads (read from shared memory).
#pragma once

#include "common/host_device.h"

#ifdef __CUDACC__
#define YF_BLOCK __device__ __forceinline__
#else
#define YF_BLOCK inline
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>
#endif

namespace yolov9_fast {

#ifdef __CUDACC__

struct DeviceBlock {
  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }

  template <class Body>
  __device__ __forceinline__ void phase(Body&& body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

template <class Value, class Block>
class PerThread {
 public:
  __device__ __forceinline__ explicit PerThread(const Block&) {}
  __device__ __forceinline__ Value& operator[](int) { return value_; }

 private:
  Value value_{};
};

#else

class HostBlock {
 public:
  // seed 0: threads in their order; else in another order for every phase.
  explicit HostBlock(int threads, uint32_t seed = 0) : order_(threads), shuffled_(seed != 0), random_(seed) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  int threads() const { return static_cast<int>(order_.size()); }

  template <class Body>
  void phase(Body&& body) const {
    if (shuffled_) {
      for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random_() % i]);
    }
    for (const int thread : order_) body(thread);
  }

 private:
  mutable std::vector<int> order_;
  bool shuffled_;
  mutable std::minstd_rand random_;
};

template <class Value, class Block>
class PerThread {
 public:
  explicit PerThread(const Block& block) : values_(block.threads()) {}
  Value& operator[](int thread) { return values_[thread]; }

 private:
  std::vector<Value> values_;
};

#endif

}  // namespace yolov9_fast
