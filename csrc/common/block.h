// A thread block as a template parameter: an algorithm written as phases between barriers runs on the GPU (DeviceBlock)
// and, thread by thread, on the host (emulated/host_block.h), where tests compare it with the reference without a GPU.
//
//   template <class Block> YF_BLOCK void sum(const Block& block, Shared& shared, ...) {
//     PerThread<float, Block> mine(block);                    // a thread's values that last over phases (registers)
//     block.phase([&](int t) { mine[t] = ...; });             // every thread runs it; then a barrier
//     block.phase([&](int t) { shared.sum[t] = mine[t]; });   // shared memory: an object that the caller owns
//   }
//
// Within a phase no thread may read what another writes. Values that decide which phases follow must be the same for
// all threads (read from shared memory).
#pragma once

#include "common/host_device.h"

#ifdef YF_CUDA
#define YF_BLOCK __device__ __forceinline__
#else
#define YF_BLOCK inline
#endif

namespace yolov9_fast {

template <class Value, class Block>
class PerThread;

#ifdef YF_CUDA

struct DeviceBlock {
  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }

  template <class Body>
  __device__ __forceinline__ void phase(Body&& body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

template <class Value>
class PerThread<Value, DeviceBlock> {
 public:
  __device__ __forceinline__ explicit PerThread(const DeviceBlock&) {}
  __device__ __forceinline__ Value& operator[](int) { return value_; }

 private:
  Value value_{};
};

#endif

}  // namespace yolov9_fast
