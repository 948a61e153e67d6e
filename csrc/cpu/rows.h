// Runs of elements of any floating dtype to float or double and back, a register at a time.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace yolov9_fast {

// `step`: elements from one to the next in memory; the other side is dense.
template <class T>
inline void load_run(const T* source, int64_t step, Compute<T>* run, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    if (step == 1) {
      store(run + i, load(source + i, AllLanes{}), AllLanes{});
    } else {
      alignas(64) T part[L];
      for (int k = 0; k < L; ++k) part[k] = source[(i + k) * step];
      store(run + i, load(part, AllLanes{}), AllLanes{});
    }
  }
  for (; i < count; ++i) run[i] = static_cast<Compute<T>>(source[i * step]);
}

template <class T>
inline void store_run(const Compute<T>* run, T* target, int64_t step, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    if (step == 1) {
      store(target + i, load(run + i, AllLanes{}), AllLanes{});
    } else {
      alignas(64) T part[L];
      store(part, load(run + i, AllLanes{}), AllLanes{});
      for (int k = 0; k < L; ++k) target[(i + k) * step] = part[k];
    }
  }
  for (; i < count; ++i) target[i * step] = static_cast<T>(run[i]);
}

}  // namespace yolov9_fast
