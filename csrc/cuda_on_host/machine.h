// The state of cuda_on_host, shared by runtime.cpp and accesses.cpp.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <random>
#include <string>
#include <vector>

namespace cuda_on_host {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;

enum class State { ready, at_barrier, in_exchange, finished };

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::ready;
  dim3 thread;
  unsigned number = 0;     // in the block
  unsigned exchanges = 0;  // that it has taken part in since the last barrier
  void* sanitizer = nullptr;
};

struct Warp {
  unsigned arrived = 0, lanes = 0;
  alignas(16) char values[kWarp][16];
};

struct Range {
  const char* begin;
  const char* end;
  bool holds(const void* at, size_t size) const {
    const char* first = static_cast<const char*>(at);
    return first >= begin && first + size <= end;
  }
};

struct Machine {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Range stacks{nullptr, nullptr};
  void* scheduler = nullptr;  // its stack pointer
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Fibre* running = nullptr;
  void (*body)(const void*) = nullptr;
  const char* kernel = nullptr;
  Range parameters{nullptr, nullptr};
  Index index;
  std::minstd_rand random;
  bool shuffled = false;
  std::map<void*, size_t> shared;  // what this block's threads have used, by address
  std::vector<char> dynamic;
  uint32_t launches = 0, block = 0, barriers = 0;
  std::string finding;  // the first of this launch
};

// As CUDA's: current device and last error are a thread's own.
struct Caller {
  int device = 0, guards = 0;
  bool launching = false;
  cudaError_t error = cudaSuccess;
  const char* unchecked = nullptr;  // a kernel that no cudaGetLastError has followed
  std::vector<Range> memory;        // that its kernels may use
  std::vector<std::shared_ptr<void>> kept;  // so that none of it becomes other memory meanwhile
  std::string finding;
};

extern Machine machine;
extern thread_local Caller caller;

// What accesses.cpp does, where it is linked: see there.
struct Watch {
  void (*atomic)(void* at, size_t size, bool begins);
  void (*switches)();  // another thread of the block goes on
};
extern Watch watch;

}  // namespace cuda_on_host
