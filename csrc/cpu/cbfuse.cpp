// cbfuse on the CPU: the sum of the target and of maps resized to it by nearest neighbour. Reads every input and the
// target once, writes the sum once; backward reads the gradient once per input.
#include <algorithm>
#include <vector>

#include "cpu/feature_map.h"
#include "cpu/tiling.h"

namespace {

using namespace yolov9_fast;

constexpr char kOp[] = "cbfuse";

// The source index of each target index as torch computes it for mode="nearest": in float32, rounded down.
std::vector<int64_t> nearest(int64_t source, int64_t target) {
  std::vector<int64_t> index(target);
  const float scale = static_cast<float>(source) / static_cast<float>(target);
  for (int64_t i = 0; i < target; ++i)
    index[i] = source == target ? i : std::min(static_cast<int64_t>(static_cast<float>(i) * scale), source - 1);
  return index;
}

// For each source index the first target index that reads it, and at the end the target's size.
std::vector<int64_t> readers(int64_t source, int64_t target) {
  const std::vector<int64_t> index = nearest(source, target);
  std::vector<int64_t> first(source + 1);
  for (int64_t s = 0; s <= source; ++s) first[s] = std::lower_bound(index.begin(), index.end(), s) - index.begin();
  return first;
}

struct Source {
  FeatureMap map;
  std::vector<int64_t> rows, columns;
};

template <class T>
void sum_rows(const std::vector<Source>& sources, const FeatureMap& target, const FeatureMap& out) {
  using A = Compute<T>;
  torch::stable::parallel_for(0, target.batch * target.height, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> pixels(sources.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / target.height, h = i % target.height;
      for (int64_t w = 0; w < target.width; ++w) {
        for (size_t s = 0; s < sources.size(); ++s) {
          const Source& source = sources[s];
          pixels[s] = source.map.at<const T>(n, 0, source.rows[h] * source.map.width + source.columns[w]);
        }
        const T* last = target.at<const T>(n, 0, h * target.width + w);
        T* to = out.at<T>(n, 0, h * target.width + w);
        over_run<A>(target.channels, [&](auto lanes, int64_t c) {
          Vector<A> sum = load(pixels[0] + c, lanes);
          for (size_t s = 1; s < pixels.size(); ++s) sum += load(pixels[s] + c, lanes);
          store(to + c, sum + load(last + c, lanes), lanes);
        });
      }
    }
  });
}

template <class T>
void sum_planes(const std::vector<Source>& sources, const FeatureMap& target, const FeatureMap& out) {
  using A = Compute<T>;
  torch::stable::parallel_for(0, target.batch * target.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(target.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / target.channels, c = i % target.channels;
      for (int64_t h = 0; h < target.height; ++h) {
        for (size_t s = 0; s < sources.size(); ++s) {
          const Source& source = sources[s];
          const T* row = source.map.at<const T>(n, c, source.rows[h] * source.map.width);
          const int64_t* column = source.columns.data();
          if (s == 0) {
            for (int64_t w = 0; w < target.width; ++w) sum[w] = static_cast<A>(row[column[w]]);
          } else {
            for (int64_t w = 0; w < target.width; ++w) sum[w] += static_cast<A>(row[column[w]]);
          }
        }
        const T* last = target.at<const T>(n, c, h * target.width);
        T* to = out.at<T>(n, c, h * target.width);
        over_run<A>(target.width, [&](auto lanes, int64_t w) {
          store(to + w, load(sum.data() + w, lanes) + load(last + w, lanes), lanes);
        });
      }
    }
  });
}

Tensor cbfuse_forward(const std::vector<Tensor>& inputs, const Tensor& target) {
  STD_TORCH_CHECK(!inputs.empty(), kOp, ": inputs: expected at least one map, got none");
  const FeatureMap t = feature_map(target, kOp, "target");
  std::vector<Source> sources;
  for (const Tensor& input : inputs) {
    const FeatureMap map = feature_map(input, kOp, "inputs", t.layout);
    STD_TORCH_CHECK(map.batch == t.batch && map.channels == t.channels && input.scalar_type() == target.scalar_type(),
                    kOp, ": inputs: expected batch, channels and dtype of the target");
    STD_TORCH_CHECK(t.empty() || !map.empty(), kOp, ": inputs: expected maps with pixels, got an empty one");
    sources.push_back({map, nearest(map.height, t.height), nearest(map.width, t.width)});
  }
  Tensor result = empty_map(target);
  if (t.empty()) return result;
  const FeatureMap out = feature_map(result, kOp, "result", t.layout);
  dispatch(target.scalar_type(), kOp, "target", [&](auto zero) {
    using T = decltype(zero);
    if (t.channels_last()) return sum_rows<T>(sources, t, out);
    sum_planes<T>(sources, t, out);
  });
  return result;
}

template <class T>
void gather_rows(const FeatureMap& dz, const FeatureMap& dx, const std::vector<int64_t>& rows,
                 const std::vector<int64_t>& columns) {
  using A = Compute<T>;
  torch::stable::parallel_for(0, dx.batch * dx.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / dx.height, h = i % dx.height;
      for (int64_t w = 0; w < dx.width; ++w) {
        T* to = dx.at<T>(n, 0, h * dx.width + w);
        over_run<A>(dx.channels, [&](auto lanes, int64_t c) {
          Vector<A> sum{};
          for (int64_t y = rows[h]; y < rows[h + 1]; ++y)
            for (int64_t x = columns[w]; x < columns[w + 1]; ++x)
              sum += load(dz.at<const T>(n, c, y * dz.width + x), lanes);
          store(to + c, sum, lanes);
        });
      }
    }
  });
}

template <class T>
void gather_planes(const FeatureMap& dz, const FeatureMap& dx, const std::vector<int64_t>& rows,
                   const std::vector<int64_t>& columns) {
  using A = Compute<T>;
  torch::stable::parallel_for(0, dx.batch * dx.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(dx.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / dx.channels, c = i % dx.channels;
      for (int64_t h = 0; h < dx.height; ++h) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t y = rows[h]; y < rows[h + 1]; ++y) {
          const T* from = dz.at<const T>(n, c, y * dz.width);
          for (int64_t w = 0; w < dx.width; ++w)
            for (int64_t x = columns[w]; x < columns[w + 1]; ++x) sum[w] += static_cast<A>(from[x]);
        }
        T* to = dx.at<T>(n, c, h * dx.width);
        over_run<A>(dx.width, [&](auto lanes, int64_t w) { store(to + w, load(sum.data() + w, lanes), lanes); });
      }
    }
  });
}

std::vector<Tensor> cbfuse_backward(const Tensor& dz, const std::vector<int64_t>& heights,
                                    const std::vector<int64_t>& widths) {
  STD_TORCH_CHECK(heights.size() == widths.size(), kOp, ": widths: expected ", heights.size(), " values, got ",
                  widths.size());
  const FeatureMap d = feature_map(dz, kOp, "dz");
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < heights.size(); ++i) {
    gradients.push_back(empty_map(dz, d.channels, heights[i], widths[i]));
    const FeatureMap dx = feature_map(gradients.back(), kOp, "gradient", d.layout);
    if (dx.empty()) continue;
    const std::vector<int64_t> rows = readers(dx.height, d.height), columns = readers(dx.width, d.width);
    dispatch(dz.scalar_type(), kOp, "dz", [&](auto zero) {
      using T = decltype(zero);
      if (d.channels_last()) return gather_rows<T>(d, dx, rows, columns);
      gather_planes<T>(d, dx, rows, columns);
    });
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("cbfuse_forward", TORCH_BOX(&cbfuse_forward));
  library.impl("cbfuse_backward", TORCH_BOX(&cbfuse_backward));
}
