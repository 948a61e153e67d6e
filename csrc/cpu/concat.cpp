// tap_backward on the CPU: `whole` with `part` added to the channels from `start`, the gradient of a map and a channel
// slice of it that were both used. Reads and writes each element once.
#include <algorithm>

#include "cpu/tiling.h"

namespace {

using namespace yolov9_fast;

constexpr char kOp[] = "tap_backward";

template <class T>
void copy_and_add(const T* whole, const T* part, T* out, int64_t start, int64_t stop, int64_t count) {
  using A = Compute<T>;
  std::copy_n(whole, start, out);
  over_run<A>(stop - start, [=](auto lanes, int64_t i) {
    store(out + start + i, load(whole + start + i, lanes) + load(part + i, lanes), lanes);
  });
  std::copy_n(whole + stop, count - stop, out + stop);
}

Tensor tap_backward(const Tensor& whole, const Tensor& part, int64_t start) {
  const FeatureMap w = feature_map(whole, kOp, "whole");
  const FeatureMap p = feature_map(part, kOp, "part");
  STD_TORCH_CHECK(whole.scalar_type() == part.scalar_type(), kOp, ": part: expected the dtype of whole");
  STD_TORCH_CHECK(w.same_pixels(p) && start >= 0 && start + p.channels <= w.channels, kOp,
                  ": part: expected the shape of a channel slice of whole");
  Tensor result = empty_map(whole);
  if (w.empty()) return result;
  const FeatureMap out = feature_map(result, kOp, "result", w.layout);
  const int64_t stop = start + p.channels;
  dispatch(whole.scalar_type(), kOp, "whole", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    if (w.channels_last() && p.channels_last()) {
      torch::stable::parallel_for(0, w.batch * w.pixels(), 1 + 32768 / w.channels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          copy_and_add(w.at<const T>(0, 0, i), p.at<const T>(0, 0, i), out.at<T>(0, 0, i), start, stop, w.channels);
      });
      return;
    }
    // Planes; a part in another layout than whole is read with its strides.
    torch::stable::parallel_for(0, w.batch * w.channels, 1 + 32768 / w.pixels(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / w.channels, c = i % w.channels;
        const T* a = w.at<const T>(n, c, 0);
        T* o = out.at<T>(n, c, 0);
        const bool dense = w.pixel == 1 && p.pixel == 1 && out.pixel == 1;
        if (dense && c >= start && c < stop) {
          copy_and_add(a, p.at<const T>(n, c - start, 0), o, 0, w.pixels(), w.pixels());
        } else if (c < start || c >= stop) {
          for (int64_t q = 0; q < w.pixels(); ++q) o[q * out.pixel] = a[q * w.pixel];
        } else {
          const T* b = p.at<const T>(n, c - start, 0);
          for (int64_t q = 0; q < w.pixels(); ++q)
            o[q * out.pixel] = static_cast<T>(static_cast<A>(a[q * w.pixel]) + static_cast<A>(b[q * p.pixel]));
        }
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("tap_backward", TORCH_BOX(&tap_backward)); }
