// The fibres, the record of launches and the devices of cuda_on_host/cuda_runtime.h.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridRows = 65535;
constexpr size_t kMaxSharedBytes = 48 * 1024;

enum class State { ready, waiting, finished };

struct Fibre {
  ucontext_t context;
  char* stack = nullptr;
  State state = State::ready;
  dim3 thread;
  void* sanitizer = nullptr;
};

struct Launch {
  std::string kernel;
  dim3 grid, threads;
  size_t shared_bytes;
  int device;
  int64_t stream;
};

struct Machine {
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Fibre* running = nullptr;
  const std::function<void()>* body = nullptr;
  Index index;
  std::minstd_rand random;
  bool shuffled = false;
  std::map<void*, size_t> shared;  // what this block's threads have used, by address
  int device = 0;
};

Machine machine;
std::mutex one_launch;  // a device of one stream: launches from several threads queue
std::vector<Launch> record;
std::map<const void*, int> devices;

// The sanitizer is told of every change of stacks.
void leave(Fibre& fibre, bool for_good) {
  (void)for_good;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.sanitizer, machine.scheduler_stack,
                                 machine.scheduler_size);
#endif
  swapcontext(&fibre.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.sanitizer, nullptr, nullptr);
#endif
}

void run_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  Fibre& mine = *machine.running;
  (*machine.body)();
  mine.state = State::finished;
  leave(mine, true);
}

void resume(Fibre& fibre) {
  machine.running = &fibre;
  machine.index.thread = fibre.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer, fibre.stack, kStack);
#endif
  swapcontext(&machine.scheduler, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

template <class Value>
void shuffle(std::vector<Value>& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[machine.random() % i]);
}

void start(Fibre& fibre, dim3 thread) {
  if (fibre.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for the stack of a thread");
    fibre.stack = static_cast<char*>(memory);
  }
  fibre.state = State::ready;
  fibre.thread = thread;
  fibre.sanitizer = nullptr;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, run_fibre, 0);
}

void run_block(const char* kernel, unsigned threads) {
  machine.shared.clear();
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (const unsigned thread : order) start(machine.fibres[thread], dim3(thread, 0, 0));
  for (unsigned finished = 0; finished < threads;) {
    unsigned waiting = 0;
    finished = 0;
    // Until every thread waits or has finished; one that an atomic operation stopped is resumed in a later turn.
    for (bool ready = true; ready;) {
      ready = false;
      if (machine.shuffled) shuffle(order);
      for (const unsigned thread : order) {
        Fibre& fibre = machine.fibres[thread];
        if (fibre.state != State::ready) continue;
        resume(fibre);
        ready |= fibre.state == State::ready;
      }
    }
    for (const unsigned thread : order) {
      waiting += machine.fibres[thread].state == State::waiting;
      finished += machine.fibres[thread].state == State::finished;
    }
    STD_TORCH_CHECK(waiting == 0 || finished == 0, kernel, ": ", waiting, " threads of a block wait at a barrier that ",
                    finished, " threads never reach");
    for (const unsigned thread : order) {
      if (machine.fibres[thread].state == State::waiting) machine.fibres[thread].state = State::ready;
    }
  }
}

}  // namespace

Index& index() { return machine.index; }
int current_device() { return machine.device; }
void set_device(int device) { machine.device = device; }

int device_of_data(const void* data) {
  const auto found = devices.find(data);
  return found == devices.end() ? 0 : found->second;
}

void barrier() {
  Fibre& mine = *machine.running;
  mine.state = State::waiting;
  leave(mine, false);
}

void atomic() {
  if (machine.shuffled && machine.random() % 4 == 0) leave(*machine.running, false);
}

void shared_memory(void* at, size_t size) {
  if (machine.shared.emplace(at, size).second) std::memset(at, 0xFF, size);
}

void launch(const char* kernel, dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const int64_t handle = reinterpret_cast<int64_t>(stream);
  record.push_back({kernel, grid, threads, shared_bytes, machine.device, handle});
  STD_TORCH_CHECK(grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= kMaxGridRows && grid.z >= 1 &&
                      grid.z <= kMaxGridRows,
                  kernel, ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks is not possible");
  STD_TORCH_CHECK(threads.x >= 1 && threads.x <= kMaxThreads && threads.y == 1 && threads.z == 1, kernel,
                  ": a block of ", threads.x, " x ", threads.y, " x ", threads.z, " threads is not possible");
  STD_TORCH_CHECK(handle / 1000 == machine.device + 1, kernel, ": launched on device ", machine.device,
                  " into a stream of device ", handle / 1000 - 1);
  const char* seed = std::getenv("YOLOV9_FAST_CUDA_SEED");
  const unsigned number = seed == nullptr ? 0 : static_cast<unsigned>(std::atol(seed));
  machine.shuffled = number != 0;
  machine.random.seed(number + static_cast<unsigned>(record.size()));
  if (machine.fibres.size() < threads.x) machine.fibres.resize(kMaxThreads);
  machine.body = &thread;
  machine.index.grid = grid;
  machine.index.threads = threads;
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (machine.shuffled) shuffle(blocks);
  for (const uint64_t block : blocks) {
    machine.index.block = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    run_block(kernel, threads.x);
    size_t used = 0;
    for (const auto& [at, size] : machine.shared) used += size;
    STD_TORCH_CHECK(used <= kMaxSharedBytes, kernel, ": ", used, " bytes of shared memory; a block has ",
                    kMaxSharedBytes);
  }
}

}  // namespace cuda_on_host

// A stream's handle: 1000 x (device + 1), plus the number that `use_stream` has set.
namespace {
int64_t stream_number = 0;
}

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(1000 * (int64_t{device} + 1) + stream_number);
  return 0;
}

namespace {

// Kernel, blocks (x, y, z), threads, device and stream of every launch since the last call, as text for Python.
std::string take_launches() {
  std::string text;
  for (const auto& one : cuda_on_host::record) {
    text += one.kernel + " " + std::to_string(one.grid.x) + " " + std::to_string(one.grid.y) + " " +
            std::to_string(one.grid.z) + " " + std::to_string(one.threads.x) + " " + std::to_string(one.device) + " " +
            std::to_string(one.stream % 1000) + "\n";
  }
  cuda_on_host::record.clear();
  return text;
}

}  // namespace

extern "C" {

// For ctypes. The text stays valid until the next call.
__attribute__((visibility("default"))) const char* cuda_on_host_take_launches() {
  static std::string text;
  text = take_launches();
  return text.c_str();
}

__attribute__((visibility("default"))) void cuda_on_host_place(const void* data, int device) {
  if (device < 0) {
    cuda_on_host::devices.erase(data);
  } else {
    cuda_on_host::devices[data] = device;
  }
}

__attribute__((visibility("default"))) int cuda_on_host_current_device() { return cuda_on_host::current_device(); }

__attribute__((visibility("default"))) void cuda_on_host_use_stream(int number) { stream_number = number; }
}
