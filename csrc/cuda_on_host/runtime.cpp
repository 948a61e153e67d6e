// The fibres, the record of launches and the devices of cuda_on_host/cuda_runtime.h.
#include "machine.h"

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <mutex>
#include <numeric>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_host {

Machine machine;
thread_local Caller caller;
Watch watch{};

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMaxGridRows = 65535, kMaxBlockDepth = 64;
constexpr size_t kMaxSharedBytes = 48 * 1024;         // without cudaFuncSetAttribute
constexpr size_t kMostSharedBytes = 99 * 1024;        // the least of the architectures that are built for, 8.6
constexpr int kStreams = 1000;                        // of a device: a handle is kStreams * (device + 1) + number

struct Recorded {
  Launch launch;
  int device;
};

std::mutex one_launch;  // a device of one stream: launches from several threads queue
std::vector<Recorded> record;
std::map<const void*, int> devices;
std::map<std::string, size_t> allowed_shared_bytes;
std::mutex of_maps;
int64_t stream_number = 0;

// Switching stacks: all that a call preserves is on the stack that is left. swapcontext would do, but asks the kernel
// for the signal mask each time.
#if defined(__x86_64__)
extern "C" void cuda_on_host_switch(void** left, void* entered);
asm(R"(
.text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

void prepare(Fibre& fibre, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fibre.stack + kStack) - 1;
  top[0] = nullptr;  // where `entry` would return to; the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  fibre.stack_pointer = top - 6;
}
#else
std::map<void**, ucontext_t> contexts;

void cuda_on_host_switch(void** left, void* entered) {
  *left = left;
  swapcontext(&contexts[left], &contexts[static_cast<void**>(entered)]);
}

void prepare(Fibre& fibre, void (*entry)()) {
  ucontext_t& context = contexts[&fibre.stack_pointer];
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  fibre.stack_pointer = &fibre.stack_pointer;
}
#endif

// The sanitizer is told of every change of stacks.
void leave(Fibre& fibre, bool for_good) {
  (void)for_good;
  if (watch.switches != nullptr) watch.switches();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.sanitizer, machine.scheduler_stack,
                                 machine.scheduler_size);
#endif
  cuda_on_host_switch(&fibre.stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.sanitizer, nullptr, nullptr);
#endif
}

void run_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  Fibre& mine = *machine.running;
  machine.body(machine.parameters.begin);
  mine.state = State::finished;
  leave(mine, true);
}

void resume(Fibre& fibre) {
  machine.running = &fibre;
  machine.index.thread = fibre.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer, fibre.stack, kStack);
#endif
  cuda_on_host_switch(&machine.scheduler, fibre.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

template <class Value>
void shuffle(std::vector<Value>& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[machine.random() % i]);
}

void make_fibres() {
  if (!machine.fibres.empty()) return;
  void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for the stacks of a block");
  machine.stacks = {static_cast<char*>(memory), static_cast<char*>(memory) + kMaxThreads * kStack};
  machine.fibres.resize(kMaxThreads);
  machine.warps.resize(kMaxThreads / kWarp);
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    machine.fibres[i].stack = static_cast<char*>(memory) + i * kStack;
    machine.fibres[i].number = i;
  }
}

unsigned count(State state, unsigned threads) {
  unsigned found = 0;
  for (unsigned i = 0; i < threads; ++i) found += machine.fibres[i].state == state;
  return found;
}

// Until every thread waits or has finished; one that an atomic operation stopped is resumed in a later turn.
void run_ready(std::vector<unsigned>& order) {
  for (bool ready = true; ready;) {
    ready = false;
    if (machine.shuffled) shuffle(order);
    for (const unsigned thread : order) {
      if (machine.fibres[thread].state == State::ready) resume(machine.fibres[thread]);
    }
    for (const unsigned thread : order) ready |= machine.fibres[thread].state == State::ready;
  }
}

void run_block(std::vector<unsigned>& order) {
  const unsigned threads = static_cast<unsigned>(order.size());
  const dim3 size = machine.index.threads;
  machine.shared.clear();
  machine.barriers = 0;
  std::fill(machine.dynamic.begin(), machine.dynamic.end(), '\xff');
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = machine.fibres[i];
    prepare(fibre, run_fibre);
    fibre.state = State::ready;
    fibre.thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    fibre.exchanges = 0;
    fibre.sanitizer = nullptr;
    machine.warps[i / kWarp].arrived = 0;
  }
  for (unsigned finished = 0; finished < threads;) {
    run_ready(order);
    const unsigned exchanging = count(State::in_exchange, threads), waiting = count(State::at_barrier, threads);
    finished = count(State::finished, threads);
    STD_TORCH_CHECK(machine.finding.empty(), machine.finding);
    STD_TORCH_CHECK(exchanging == 0, machine.kernel, ": ", exchanging,
                    " threads of a block wait at an operation of a warp that others of its lanes never reach");
    STD_TORCH_CHECK(waiting == 0 || finished == 0, machine.kernel, ": ", waiting,
                    " threads of a block wait at a barrier that ", finished, " threads never reach");
    ++machine.barriers;
    for (unsigned i = 0; i < threads; ++i) {
      if (machine.fibres[i].state != State::at_barrier) continue;
      machine.fibres[i].state = State::ready;
      machine.fibres[i].exchanges = 0;
    }
  }
}

// What CUDA itself refuses.
cudaError_t refused(const Launch& launch) {
  const dim3 grid = launch.grid, threads = launch.threads;
  const uint64_t size = uint64_t{threads.x} * threads.y * threads.z;
  if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > kMaxGridRows || grid.z < 1 || grid.z > kMaxGridRows ||
      size < 1 || size > kMaxThreads || threads.z > kMaxBlockDepth) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard<std::mutex> lock(of_maps);
  const auto allowed = allowed_shared_bytes.find(launch.kernel);
  const size_t most = allowed == allowed_shared_bytes.end() ? kMaxSharedBytes : allowed->second;
  return launch.shared_bytes > most || static_cast<int64_t>(size) > launch.most_threads ? cudaErrorInvalidValue
                                                                                       : cudaSuccess;
}

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool only_ends() { return std::string(variable("YOLOV9_FAST_CUDA_BLOCKS")) == "ends"; }

}  // namespace

Index& index() { return machine.index; }
int current_device() { return caller.device; }
bool poisoned() { return !only_ends(); }

void enter_device(int device) {
  caller.device = device;
  ++caller.guards;
}

void leave_device(int device) {
  caller.device = device;
  if (--caller.guards > 0) return;
  caller.memory.clear();
  caller.kept.clear();
  const std::string found = std::exchange(caller.finding, {});
  const char* unchecked = std::exchange(caller.unchecked, nullptr);
  if (std::uncaught_exceptions() > 0) return;
  STD_TORCH_CHECK(found.empty(), found);
  STD_TORCH_CHECK(unchecked == nullptr, unchecked, ": no cudaGetLastError after its launch");
}

cudaError_t last_error(bool reset) {
  caller.unchecked = nullptr;
  return reset ? std::exchange(caller.error, cudaSuccess) : caller.error;
}

cudaError_t set_attribute(const char* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > kMostSharedBytes) return caller.error = cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(of_maps);
  allowed_shared_bytes[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

int device_of_data(const void* data) {
  const std::lock_guard<std::mutex> lock(of_maps);
  const auto found = devices.find(data);
  return found == devices.end() ? 0 : found->second;
}

void device_memory(const void* data, size_t size) {
  const char* begin = static_cast<const char*>(data);
  if (size > 0) caller.memory.push_back({begin, begin + size});
}

// The address sanitizer has to see the tensors that a wrapper frees too early.
void keep(std::shared_ptr<void> tensor) {
  if (watch.atomic != nullptr) caller.kept.push_back(std::move(tensor));
}

void barrier() {
  machine.running->state = State::at_barrier;
  leave(*machine.running, false);
}

// Waits for the others of the lanes.
static void meet(unsigned lanes) {
  Fibre& mine = *machine.running;
  const unsigned first = mine.number / kWarp * kWarp, lane = mine.number % kWarp;
  Warp& warp = machine.warps[mine.number / kWarp];
  warp.arrived |= 1u << lane;
  if ((lanes >> lane & 1) == 0) machine.finding = std::string(machine.kernel) + ": a lane is not among its own lanes";
  if ((warp.arrived & lanes) != lanes) {
    mine.state = State::in_exchange;
    leave(mine, false);
    return;
  }
  if (watch.switches != nullptr) watch.switches();
  warp.arrived &= ~lanes;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    Fibre& other = machine.fibres[first + i];
    ++other.exchanges;
    if (other.state == State::in_exchange) other.state = State::ready;
  }
}

// Of those named, the lanes that the block has.
static unsigned existing(unsigned lanes) {
  const dim3 size = machine.index.threads;
  const unsigned left = size.x * size.y * size.z - machine.running->number / kWarp * kWarp;
  return left < kWarp ? lanes & ((1u << left) - 1) : lanes;
}

void exchange(unsigned lanes, void* value, size_t size, int from) {
  Warp& warp = machine.warps[machine.running->number / kWarp];
  lanes = existing(lanes);
  if (size > 0) std::memcpy(warp.values[machine.running->number % kWarp], value, size);
  meet(lanes);
  if (size == 0) return;
  if ((lanes >> from & 1) != 0) {
    std::memcpy(value, warp.values[from], size);
  } else {
    std::memset(value, 0xFF, size);  // CUDA leaves it undefined
  }
  meet(lanes);  // before anyone puts down its next value
}

unsigned vote(unsigned lanes, bool predicate) {
  Warp& warp = machine.warps[machine.running->number / kWarp];
  const unsigned all = existing(lanes);
  warp.values[machine.running->number % kWarp][0] = predicate;
  meet(all);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>((all >> i & 1) != 0 && warp.values[i][0]) << i;
  meet(all);
  return votes;
}

Atomic::Atomic(void* at, size_t size) {
  if (machine.shuffled && machine.random() % 4 == 0) leave(*machine.running, false);
  if (watch.atomic != nullptr) watch.atomic(at, size, true);
}
Atomic::~Atomic() {
  if (watch.atomic != nullptr) watch.atomic(nullptr, 0, false);
}

void shared_memory(void* at, size_t size) {
  if (machine.shared.emplace(at, size).second) std::memset(at, 0xFF, size);
}

void* dynamic_shared_memory() {
  if (!machine.dynamic.empty()) machine.shared.emplace(machine.dynamic.data(), machine.dynamic.size());
  return machine.dynamic.data();
}

void run(const Launch& launch, void (*thread)(const void*), const void* parameters, size_t size) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const char* kernel = launch.kernel;
  const int64_t handle = reinterpret_cast<int64_t>(launch.stream);
  record.push_back({launch, caller.device});
  caller.unchecked = kernel;
  STD_TORCH_CHECK(caller.guards > 0, kernel, ": launched outside a device guard");
  STD_TORCH_CHECK(handle != 0, kernel, ": launched into the legacy default stream");
  STD_TORCH_CHECK(handle / kStreams == caller.device + 1, kernel, ": launched on device ", caller.device,
                  " into a stream of device ", handle / kStreams - 1);
  const cudaError_t error = refused(launch);
  if (error != cudaSuccess) {
    caller.error = error;
    return;
  }
  make_fibres();
  const unsigned number = static_cast<unsigned>(std::atol(variable("YOLOV9_FAST_CUDA_SEED")));
  machine.shuffled = number != 0;
  machine.random.seed(number + static_cast<unsigned>(record.size()));
  machine.body = thread;
  machine.kernel = kernel;
  machine.finding.clear();
  ++machine.launches;
  machine.parameters = {static_cast<const char*>(parameters), static_cast<const char*>(parameters) + size};
  machine.index.grid = launch.grid;
  machine.index.threads = launch.threads;
  machine.dynamic = std::vector<char>(launch.shared_bytes);
  std::vector<unsigned> threads(launch.threads.x * launch.threads.y * launch.threads.z);
  std::iota(threads.begin(), threads.end(), 0u);
  const dim3 grid = launch.grid;
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> blocks;
  if (only_ends()) {
    blocks = {0};
    if (all > 1) blocks.push_back(all - 1);
  } else {
    blocks.resize(all);
    std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    if (machine.shuffled) shuffle(blocks);
  }
  struct Launching {
    Launching() { caller.launching = true; }
    ~Launching() { caller.launching = false; }
  } const launching;
  for (const uint64_t block : blocks) {
    machine.index.block = dim3(static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                               static_cast<unsigned>(block / grid.x / grid.y));
    machine.block = static_cast<uint32_t>(block);
    run_block(threads);
    size_t used = 0;
    for (const auto& [at, bytes] : machine.shared) used += at == machine.dynamic.data() ? 0 : bytes;
    STD_TORCH_CHECK(used <= kMaxSharedBytes, kernel, ": ", used, " bytes of static shared memory; a block has ",
                    kMaxSharedBytes);
    STD_TORCH_CHECK(used + launch.shared_bytes <= kMostSharedBytes, kernel, ": ", used + launch.shared_bytes,
                    " bytes of shared memory; a block has ", kMostSharedBytes);
  }
}

}  // namespace cuda_on_host

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(cuda_on_host::kStreams * (int64_t{device} + 1) + cuda_on_host::stream_number);
  return 0;
}

// For ctypes. Kernel, blocks (x, y, z), threads, bytes of dynamic shared memory, device and stream of every launch since
// the last call; the text stays valid until the next.
extern "C" const char* cuda_on_host_take_launches() {
  static std::string text;
  text.clear();
  for (const auto& [launch, device] : cuda_on_host::record) {
    const auto number = [](auto value) { return " " + std::to_string(value); };
    text += launch.kernel + number(launch.grid.x) + number(launch.grid.y) + number(launch.grid.z) +
            number(launch.threads.x * launch.threads.y * launch.threads.z) + number(launch.shared_bytes) +
            number(device) + number(reinterpret_cast<int64_t>(launch.stream) % cuda_on_host::kStreams) + "\n";
  }
  cuda_on_host::record.clear();
  return text.c_str();
}

extern "C" void cuda_on_host_place(const void* data, int device) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::of_maps);
  if (device < 0) {
    cuda_on_host::devices.erase(data);
  } else {
    cuda_on_host::devices[data] = device;
  }
}

extern "C" int cuda_on_host_current_device() { return cuda_on_host::current_device(); }

extern "C" void cuda_on_host_use_stream(int number) { cuda_on_host::stream_number = number; }
