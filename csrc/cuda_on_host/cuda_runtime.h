// What csrc/cuda/*.cu use of CUDA, run by the host: for tests on a machine without a GPU. csrc/on_host.py turns each
// launch `kernel<<<grid, threads, bytes, stream>>>(…)` into a call of `launch`, which runs the blocks one after the other
// and the threads of a block as fibres: __syncthreads() switches to the next thread, an atomic operation may. The order
// of blocks and threads is shuffled by YOLOV9_FAST_CUDA_SEED (0: ascending).
//
// Checked: limits of the grid and the block, a barrier that some threads of a block do not reach, the device that is
// current at a launch and that of its stream. Shared memory and new tensors are filled with 0xFF (NaN, -1) first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define YF_CUDA_ON_HOST
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace cuda_on_host {

struct Index {
  dim3 grid, threads, block, thread;
};
Index& index();  // of the thread that runs now

void launch(const char* kernel, dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            const std::function<void()>& thread);
void barrier();
void atomic();                             // another thread may run before the operation
void shared_memory(void* at, size_t size);  // the first thread of a block that comes here poisons it
int device_of_data(const void* data);       // of a tensor's first number: as the tests set it, else 0
void set_device(int device);
int current_device();

template <class Value>
Value& shared(Value& value) {
  shared_memory(&value, sizeof value);
  return value;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(current_device()) { set_device(device); }
  ~DeviceGuard() { set_device(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

template <class Tensor>
int device_of(const Tensor& tensor) {
  return device_of_data(tensor.const_data_ptr());
}

}  // namespace cuda_on_host

#define blockIdx (cuda_on_host::index().block)
#define threadIdx (cuda_on_host::index().thread)
#define gridDim (cuda_on_host::index().grid)
#define blockDim (cuda_on_host::index().threads)

inline void __syncthreads() { cuda_on_host::barrier(); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

template <class Number>
Number atomicAdd(Number* where, Number value) {
  cuda_on_host::atomic();
  return std::exchange(*where, *where + value);
}
template <class Number>
Number atomicMax(Number* where, Number value) {
  cuda_on_host::atomic();
  return std::exchange(*where, std::max(*where, value));
}
template <class Number>
Number atomicExch(Number* where, Number value) {
  cuda_on_host::atomic();
  return std::exchange(*where, value);
}
template <class Number>
Number atomicCAS(Number* where, Number expected, Number value) {
  cuda_on_host::atomic();
  return *where == expected ? std::exchange(*where, value) : *where;
}
