// What csrc/cuda/*.cu use of CUDA, run by the host: for tests on a machine without a GPU. csrc/on_host.py turns each
// launch `kernel<<<grid, threads, bytes, stream>>>(…)` into a call of `launch`, which runs the blocks one after the other
// and the threads of a block as fibres: a barrier and a warp's exchange switch to the next thread, an atomic operation
// may. The order of blocks and threads is shuffled by YOLOV9_FAST_CUDA_SEED (0: ascending).
//
// Errors, each an exception of the wrapper that made it: a launch that no cudaGetLastError follows, one outside a device
// guard, on another device than that of its stream, into the legacy default stream; a barrier or an exchange that some
// threads do not reach; too much shared memory. What CUDA refuses (limits of grid, block and dynamic shared memory) is
// what cudaGetLastError then returns. Shared memory and new tensors are filled with 0xFF (NaN, -1) first.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#define YF_CUDA_ON_HOST
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace cuda_on_host {

struct Index {
  dim3 grid, threads, block, thread;
};
Index& index();  // of the thread that runs now

struct Launch {
  const char* kernel;
  int64_t most_threads;  // __launch_bounds__
  dim3 grid, threads;
  size_t shared_bytes;
  cudaStream_t stream;
};
void run(const Launch& launch, void (*thread)(const void* parameters), const void* parameters, size_t size);
cudaError_t set_attribute(const char* kernel, cudaFuncAttribute attribute, int value);
cudaError_t last_error(bool reset);

void barrier();
void exchange(unsigned lanes, void* value, size_t size, int from);  // -1: nothing; else that lane's value
unsigned vote(unsigned lanes, bool predicate);
void shared_memory(void* at, size_t size);  // the first thread of a block that comes here poisons it
void* dynamic_shared_memory();

int device_of_data(const void* data);  // of a tensor's first number: as the tests set it, else 0
void device_memory(const void* data, size_t size);
void keep(std::shared_ptr<void> tensor);  // until the outermost guard ends, where accesses are watched
bool poisoned();  // whether new tensors are to be poisoned
int current_device();
void enter_device(int device);
void leave_device(int device);  // throws what was found inside

// Around an operation that no other thread can divide.
class Atomic {
 public:
  Atomic(void* at, size_t size);
  ~Atomic();
  Atomic(const Atomic&) = delete;
  Atomic& operator=(const Atomic&) = delete;
};

template <class Value>
Value& shared(Value& value) {
  shared_memory(&value, sizeof value);
  return value;
}

// The parameters are copied at the launch, as CUDA does.
template <class Kernel, class... Parameters>
void launch(const Launch& launch, Kernel, Parameters... given) {
  using Copies = std::tuple<Parameters...>;
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel takes at most 4 KB of parameters");
  const Copies parameters(given...);
  const auto thread = [](const void* copies) { std::apply(Kernel{}, *static_cast<const Copies*>(copies)); };
  run(launch, thread, &parameters, sizeof parameters);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(current_device()) { enter_device(device); }
  ~DeviceGuard() noexcept(false) { leave_device(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

// Kernels may use the memory of tensors that were asked for their device, and no other.
template <class Tensor>
int device_of(const Tensor& tensor) {
  size_t size = tensor.numel() > 0 ? tensor.element_size() : 0;
  for (int64_t i = 0; size > 0 && i < tensor.dim(); ++i) {
    size += static_cast<size_t>((tensor.size(i) - 1) * tensor.stride(i)) * tensor.element_size();
  }
  device_memory(tensor.const_data_ptr(), size);
  return device_of_data(tensor.const_data_ptr());
}

}  // namespace cuda_on_host

#define blockIdx (cuda_on_host::index().block)
#define threadIdx (cuda_on_host::index().thread)
#define gridDim (cuda_on_host::index().grid)
#define blockDim (cuda_on_host::index().threads)
constexpr int warpSize = 32;

inline cudaError_t cudaGetLastError() { return cuda_on_host::last_error(true); }
inline cudaError_t cudaPeekAtLastError() { return cuda_on_host::last_error(false); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline void __syncthreads() { cuda_on_host::barrier(); }
inline void __syncwarp(unsigned lanes = ~0u) { cuda_on_host::exchange(lanes, nullptr, 0, -1); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned word) { return std::popcount(word); }
inline int __popcll(unsigned long long word) { return std::popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __clz(int word) { return std::countl_zero(static_cast<unsigned>(word)); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
template <class Value>
Value __ldg(const Value* at) {
  return *at;
}

inline unsigned __ballot_sync(unsigned lanes, bool predicate) { return cuda_on_host::vote(lanes, predicate); }
inline bool __any_sync(unsigned lanes, bool predicate) { return cuda_on_host::vote(lanes, predicate) != 0; }
inline bool __all_sync(unsigned lanes, bool predicate) { return cuda_on_host::vote(lanes, predicate) == lanes; }

namespace cuda_on_host {
inline int lane() {
  const Index& i = index();
  return static_cast<int>((i.thread.x + i.threads.x * (i.thread.y + i.threads.y * i.thread.z)) % 32);
}
template <class Value>
Value shuffled(unsigned lanes, Value value, int from, int width) {
  const int segment = lane() / width * width;
  const bool inside = from >= segment && from < segment + width;
  exchange(lanes, &value, sizeof value, inside ? from : lane());
  return value;
}
}  // namespace cuda_on_host

template <class Value>
Value __shfl_sync(unsigned lanes, Value value, int from, int width = 32) {
  return cuda_on_host::shuffled(lanes, value, cuda_on_host::lane() / width * width + from % width, width);
}
template <class Value>
Value __shfl_up_sync(unsigned lanes, Value value, unsigned by, int width = 32) {
  return cuda_on_host::shuffled(lanes, value, cuda_on_host::lane() - static_cast<int>(by), width);
}
template <class Value>
Value __shfl_down_sync(unsigned lanes, Value value, unsigned by, int width = 32) {
  return cuda_on_host::shuffled(lanes, value, cuda_on_host::lane() + static_cast<int>(by), width);
}
template <class Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int by, int width = 32) {
  return cuda_on_host::shuffled(lanes, value, cuda_on_host::lane() ^ by, width);
}

template <class Number>
Number atomicAdd(Number* where, Number value) {
  const cuda_on_host::Atomic operation(where, sizeof *where);
  return std::exchange(*where, *where + value);
}
template <class Number>
Number atomicMax(Number* where, Number value) {
  const cuda_on_host::Atomic operation(where, sizeof *where);
  return std::exchange(*where, std::max(*where, value));
}
template <class Number>
Number atomicExch(Number* where, Number value) {
  const cuda_on_host::Atomic operation(where, sizeof *where);
  return std::exchange(*where, value);
}
template <class Number>
Number atomicCAS(Number* where, Number expected, Number value) {
  const cuda_on_host::Atomic operation(where, sizeof *where);
  return *where == expected ? std::exchange(*where, value) : *where;
}
