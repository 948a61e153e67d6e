// Which thread reads and writes what: the calls that `-fsanitize=thread` puts before every access, without that
// sanitizer. Within a launch the order of two accesses is known if a thread makes both, or a barrier of the block or an
// exchange of the warp lies between; blocks have no order. Reported, as an error of the launch:
//
//   - two threads access the same memory in no order, one of them writes, and not both by atomic operations (unless it
//     writes what is there already, as several threads that set one flag)
//   - shared memory is read before a thread of the block has written it
//   - a kernel uses memory that is neither shared nor of a tensor that was asked for its device, or writes a parameter
//   - the host uses a tensor's memory
#include "machine.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <unordered_map>

namespace cuda_on_host {
namespace {

struct Access {
  uint32_t launch = 0, block = 0, barriers = 0, exchanges = 0;
  uint16_t thread = 0;
  bool atomic = false;
};

struct Byte {
  Access write, read;
  bool several_blocks = false, several_threads = false;  // have read it; threads: since the last barrier
};

constexpr size_t kPage = 1024;
std::unordered_map<uintptr_t, std::unique_ptr<std::array<Byte, kPage>>> pages;
uintptr_t last_number = ~uintptr_t{0};
std::array<Byte, kPage>* last_page = nullptr;

Byte& byte_at(uintptr_t at) {
  if (at / kPage != last_number) {
    last_number = at / kPage;
    auto& page = pages[last_number];
    if (page == nullptr) page = std::make_unique<std::array<Byte, kPage>>();
    last_page = page.get();
  }
  return (*last_page)[at % kPage];
}

bool in_atomic = false;

// A write to what another thread has written: reported unless the value stays.
struct Doubtful {
  const char* at = nullptr;
  size_t size = 0;
  char before[16];
  std::string text;
} doubtful;

void settle() {
  if (doubtful.at == nullptr) return;
  const bool same = std::memcmp(doubtful.at, doubtful.before, doubtful.size) == 0;
  if (!same && machine.finding.empty()) machine.finding = doubtful.text;
  doubtful.at = nullptr;
}

bool ordered(const Access& one, const Access& other, bool shared) {
  if (one.launch != other.launch || (shared && one.block != other.block)) return true;
  if (one.block != other.block) return false;
  if (one.thread == other.thread || one.barriers != other.barriers) return true;
  return one.thread / kWarp == other.thread / kWarp && one.exchanges != other.exchanges;
}

std::string named(const Access& access) {
  return "thread " + std::to_string(access.thread) + " of block " + std::to_string(access.block);
}

bool holds(const std::vector<Range>& ranges, const void* at, size_t size) {
  for (const Range& range : ranges) {
    if (range.holds(at, size)) return true;
  }
  return false;
}

bool in_shared(const char* at) {
  for (const auto& [begin, size] : machine.shared) {
    if (at >= begin && at < static_cast<char*>(begin) + size) return true;
  }
  return false;
}

bool of_a_library(const void* at) {
  Dl_info found;
  return dladdr(at, &found) != 0;
}

void report(const std::string& text) {
  if (machine.finding.empty()) machine.finding = std::string(machine.kernel) + ": " + text;
}

enum class Kind { read, write, atomic, whole };  // whole: a read of an object, with bytes that are only padding

void check(const void* where, size_t size, Kind kind) {
  const char* at = static_cast<const char*>(where);
  const bool atomic = kind == Kind::atomic, writes = atomic || kind == Kind::write;
  if (!caller.launching) {
    if (caller.guards > 0 && holds(caller.memory, at, size) && caller.finding.empty()) {
      caller.finding = std::string("the host ") + (writes ? "writes" : "reads") + " the memory of a tensor on a device";
    }
    return;
  }
  if (machine.running == nullptr) return;  // between threads
  settle();
  static const char* const index = reinterpret_cast<const char*>(&machine.index);
  if (machine.stacks.holds(at, size) || Range{index, index + sizeof machine.index}.holds(at, size)) return;
  Access mine;
  mine.launch = machine.launches, mine.block = machine.block, mine.barriers = machine.barriers;
  mine.exchanges = machine.running->exchanges, mine.thread = static_cast<uint16_t>(machine.running->number);
  mine.atomic = atomic;
  const bool shared = in_shared(at);
  if (!shared && !holds(caller.memory, at, size)) {
    const bool readable = machine.parameters.holds(at, size) || of_a_library(at);
    if (writes || !readable) {
      report(named(mine) + (writes ? " writes" : " reads") + " memory of no tensor that was asked for its device");
    }
    return;
  }
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = byte_at(reinterpret_cast<uintptr_t>(at) + i);
    const Access &write = byte.write, &read = byte.read;
    const char* const place = shared ? " in shared memory" : " in a tensor";
    const bool of_this = write.launch == mine.launch && write.block == mine.block;
    if (shared && kind == Kind::read && !of_this) report(named(mine) + " reads shared memory that nobody has written");
    if (!(atomic && write.atomic) && !ordered(write, mine, shared)) {
      const std::string text = named(mine) + (writes ? " writes" : " reads") + " what " + named(write) +
                               " writes, in no order," + place;
      if (!writes || atomic || write.atomic || size > sizeof doubtful.before) {
        report(text);
      } else if (doubtful.at == nullptr) {
        doubtful.at = at, doubtful.size = size, doubtful.text = std::string(machine.kernel) + ": " + text;
        std::memcpy(doubtful.before, at, size);
      }
    }
    if (!writes) {
      const bool known = read.launch == mine.launch && !(shared && read.block != mine.block);
      if (!known) byte.several_blocks = byte.several_threads = false;
      if (known && read.block != mine.block) byte.several_blocks = true;
      if (known && read.block == mine.block && read.barriers != mine.barriers) byte.several_threads = false;
      if (known && !ordered(read, mine, shared)) byte.several_threads = true;
      byte.read = mine;
      continue;
    }
    const bool others = read.launch == mine.launch && !(shared && read.block != mine.block) &&
                        (byte.several_blocks ||
                         (byte.several_threads && read.block == mine.block && read.barriers == mine.barriers));
    if (others || !ordered(read, mine, shared)) {
      report(named(mine) + " writes what " + (others ? "other threads" : named(read)) + " may read before or after," + place);
    }
    byte.write = mine;
  }
}

void access(const void* at, size_t size, Kind kind) {
  if (!in_atomic) check(at, size, kind);
}

[[maybe_unused]] const bool watching = [] {
  watch.atomic = [](void* at, size_t size, bool begins) {
    in_atomic = begins;
    if (begins) check(at, size, Kind::atomic);
  };
  watch.switches = settle;
  return true;
}();

}  // namespace
}  // namespace cuda_on_host

using cuda_on_host::access;
using cuda_on_host::Kind;

#define YF_ACCESS(size)                                                                         \
  extern "C" void __tsan_read##size(void* at) { access(at, size, Kind::read); }                 \
  extern "C" void __tsan_write##size(void* at) { access(at, size, Kind::write); }               \
  extern "C" void __tsan_unaligned_read##size(void* at) { access(at, size, Kind::read); }       \
  extern "C" void __tsan_unaligned_write##size(void* at) { access(at, size, Kind::write); }     \
  extern "C" void __tsan_volatile_read##size(void* at) { access(at, size, Kind::read); }        \
  extern "C" void __tsan_volatile_write##size(void* at) { access(at, size, Kind::write); }
YF_ACCESS(1)
YF_ACCESS(2)
YF_ACCESS(4)
YF_ACCESS(8)
YF_ACCESS(16)
extern "C" void __tsan_read_range(void* at, unsigned long size) { access(at, size, Kind::whole); }
extern "C" void __tsan_write_range(void* at, unsigned long size) { access(at, size, Kind::write); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
// Reference counts of tensors.
extern "C" int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
extern "C" unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
