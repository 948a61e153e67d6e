// 3×3 and 1×1 convolutions of one map of few channels on the CPU (stride 1, zero padding k / 2), channels_last: products of
// rows, as each pixel's 3×3 neighbourhood is three runs of adjacent numbers in a copy of the map with a border of zeros.
// The copy is of a few rows at a time, which stay in the first-level cache. float32 and float64.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/feature_map.h"
#include "cpu/narrow_product.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::narrow;

constexpr char kOp[] = "convs";
constexpr int64_t kMultiple = 8;  // of channels: whole half vectors, whatever the vector unit

template <class Body>
void dispatch_real(ScalarType type, const Body& body) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp, ": expected float32 or float64");
  if (type == ScalarType::Float) return body(float{});
  return body(double{});
}

FeatureMap rows_of(const Tensor& x, const char* name) {
  const FeatureMap map = feature_map(x, kOp, name, Layout::kChannelsLast);
  STD_TORCH_CHECK(map.channels % kMultiple == 0, kOp, ": ", name, ": expected a multiple of ", kMultiple,
                  " channels, got ", map.channels);
  return map;
}

// An uninitialised [B, channels, H, W] of the pixels and dtype of `like`, channels_last.
Tensor channels_last_map(const Tensor& like, int64_t channels) {
  return torch::stable::empty({like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type(),
                              torch::headeronly::Layout::Strided, like.device(), false,
                              memory_format(Layout::kChannelsLast));
}

// The side of the kernel of `weight` [outputs, inputs, k, k].
int64_t side_of(const Tensor& weight, const Tensor& like, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == inputs &&
                      weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3),
                  kOp, ": weights: expected [", outputs, ", ", inputs, ", k, k] of k = 1 or 3");
  STD_TORCH_CHECK(weight.scalar_type() == like.scalar_type(), kOp, ": weights: expected the dtype of the maps");
  return weight.size(2);
}

// A few rows of an image: the unit of work, from the shape alone.
struct Strips {
  Strips(const FeatureMap& map, int64_t widest, int64_t itemsize) {
    const int64_t row = std::max<int64_t>((map.width + 2) * widest * itemsize, 1);
    const int64_t fit = std::max<int64_t>(24576 / row - 2, 1);
    per_image = (map.height + fit - 1) / fit;
    rows = per_image > 0 ? (map.height + per_image - 1) / per_image : 0;
    per_image = rows > 0 ? (map.height + rows - 1) / rows : 0;
    count = map.empty() ? 0 : map.batch * per_image;
    height = map.height;
  }
  int64_t image(int64_t index) const { return index / per_image; }
  int64_t first(int64_t index) const { return index % per_image * rows; }
  int64_t extent(int64_t index) const { return std::min(rows, height - first(index)); }

  int64_t rows, per_image, count, height;
};

// Rows `first` - 1 to `first` + `count` of image n, each with a pixel of zeros before and after it, dense.
template <class T>
void copy_with_border(const FeatureMap& map, int64_t n, int64_t first, int64_t count, std::vector<T>& to) {
  const int64_t channels = map.channels, line = (map.width + 2) * channels;
  to.resize((count + 2) * line);
  T* out = to.data();
  for (int64_t y = first - 1; y <= first + count; ++y, out += line) {
    if (y < 0 || y >= map.height) {
      std::fill(out, out + line, T(0));
      continue;
    }
    std::fill(out, out + channels, T(0));
    const T* from = map.at<const T>(n, 0, y * map.width);
    if (map.pixel == channels) {
      std::memcpy(out + channels, from, map.width * channels * sizeof(T));
    } else {
      for (int64_t x = 0; x < map.width; ++x)
        std::memcpy(out + (x + 1) * channels, from + x * map.pixel, channels * sizeof(T));
    }
    std::fill(out + line - channels, out + line, T(0));
  }
}

// to[r][c] = from[r][c] for matrices of any strides. One by one: gathers and scatters are slower on some processors.
template <class T>
#if defined(__GNUC__) && !defined(__clang__)
[[gnu::noinline, gnu::optimize("no-tree-vectorize")]]
#endif
void copy_strided(const T* from, int64_t from_row, int64_t from_column, T* to, int64_t to_row, int64_t to_column,
                  int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * to_row + c * to_column] = from[r * from_row + c * from_column];
}

// One convolution by packed weights: for each panel of outputs [k][k · inputs][columns of the panel].
template <class T>
struct Packed {
  int64_t side, inputs, outputs;
  std::vector<T> values;

  // `transposed`: of the gradient of the input, which convolves by the kernels mirrored, outputs and inputs exchanged.
  Packed(const Tensor& weight, bool transposed)
      : side(weight.size(2)), inputs(weight.size(transposed ? 0 : 1)), outputs(weight.size(transposed ? 1 : 0)) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    const int64_t out_step = weight.stride(transposed ? 1 : 0), in_step = weight.stride(transposed ? 0 : 1);
    const int64_t y_step = weight.stride(2), x_step = weight.stride(3);
    values.resize(side * side * inputs * outputs);
    T* to = values.data();
    for (int64_t o = 0; o < outputs; o += panel<T>(outputs - o)) {
      const int64_t columns = panel<T>(outputs - o);
      for (int64_t y = 0; y < side; ++y) {
        for (int64_t x = 0; x < side; ++x) {
          const T* corner = from + (transposed ? side - 1 - y : y) * y_step + (transposed ? side - 1 - x : x) * x_step;
          copy_strided(corner + o * out_step, in_step, out_step, to, columns, 1, inputs, columns);
          to += inputs * columns;
        }
      }
    }
  }

  // Writes, or adds, what belongs to `count` rows from `first` on of image n; `map` is their copy with a border.
  void write(const std::vector<T>& map, const FeatureMap& out, int64_t n, int64_t first, int64_t count, bool add) const {
    const int64_t line = (out.width + 2) * inputs, border = side == 3 ? 0 : line + inputs;
    const T* weights = values.data();
    for (int64_t o = 0; o < outputs;) {
      const int64_t columns = panel<T>(outputs - o);
      for (int64_t y = 0; y < count; ++y) {
        Rows<T> rows{map.data() + border + y * line,           inputs, line,      side, side * inputs, weights,
                     out.at<T>(n, o, (first + y) * out.width), out.pixel, add};
        multiply_rows(rows, out.width, columns);
      }
      weights += side * side * inputs * columns;
      o += columns;
    }
  }
};

template <class T>
std::vector<Packed<T>> packed(const std::vector<Tensor>& weights, bool transposed) {
  std::vector<Packed<T>> all;
  for (const Tensor& weight : weights) all.emplace_back(weight, transposed);
  return all;
}

int64_t grain(const Strips& strips, const FeatureMap& map, int64_t outputs) {
  const int64_t products = strips.rows * map.width * map.channels * outputs * 9;
  return 1 + 262144 / std::max<int64_t>(products, 1);
}

std::vector<Tensor> convs_forward(const Tensor& x, const std::vector<Tensor>& weights) {
  const FeatureMap in = rows_of(x, "x");
  std::vector<Tensor> results;
  std::vector<FeatureMap> out;
  int64_t outputs = 0;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 4, kOp, ": weights: expected [O, C, k, k]");
    side_of(weight, x, weight.size(0), in.channels);
    results.push_back(channels_last_map(x, weight.size(0)));
    out.push_back(rows_of(results.back(), "weights"));
    outputs += weight.size(0);
  }
  dispatch_real(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Packed<T>> all = packed<T>(weights, false);
    const Strips strips(in, in.channels, sizeof(T));
    torch::stable::parallel_for(0, strips.count, grain(strips, in, outputs), [&](int64_t begin, int64_t end) {
      std::vector<T> rows;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        copy_with_border(in, n, first, count, rows);
        for (size_t i = 0; i < all.size(); ++i) all[i].write(rows, out[i], n, first, count, false);
      }
    });
  });
  return results;
}

// The maps of a list, which have one shape but for their channels.
std::vector<FeatureMap> gradients_of(const std::vector<Tensor>& dys, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!dys.empty() && dys.size() == weights.size(), kOp, ": dys: expected one for each weight");
  std::vector<FeatureMap> maps;
  for (const Tensor& dy : dys) {
    maps.push_back(rows_of(dy, "dys"));
    STD_TORCH_CHECK(maps.back().same_pixels(maps.front()) && dy.scalar_type() == dys.front().scalar_type(), kOp,
                    ": dys: expected tensors of one dtype, batch, height and width");
  }
  return maps;
}

Tensor convs_input_grad(const std::vector<Tensor>& dys, const std::vector<Tensor>& weights) {
  const std::vector<FeatureMap> in = gradients_of(dys, weights);
  STD_TORCH_CHECK(weights.front().dim() == 4, kOp, ": weights: expected [O, C, k, k]");
  const int64_t channels = weights.front().size(1);
  int64_t widest = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    side_of(weights[i], dys.front(), in[i].channels, channels);
    widest = std::max(widest, in[i].channels);
  }
  Tensor gradient = channels_last_map(dys.front(), channels);
  const FeatureMap out = rows_of(gradient, "weights");
  dispatch_real(gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Packed<T>> all = packed<T>(weights, true);
    const Strips strips(in.front(), widest, sizeof(T));
    torch::stable::parallel_for(0, strips.count, grain(strips, in.front(), channels), [&](int64_t begin, int64_t end) {
      std::vector<T> rows;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        for (size_t i = 0; i < all.size(); ++i) {
          copy_with_border(in[i], n, first, count, rows);
          all[i].write(rows, out, n, first, count, i > 0);
        }
      }
    });
  });
  return gradient;
}

// A weight's gradient is a sum over pixels: those of a strip are summed from zero (small rounding error), the strips of
// a share are added in order, and so are the shares. Both depend on the shape alone, so any number of threads gives the
// same bits.
constexpr int64_t kShares = 8;

template <class T>
void weight_grad(const FeatureMap& x, const std::vector<FeatureMap>& dys, const std::vector<Tensor>& gradients) {
  const Strips strips(x, x.channels, sizeof(T));
  const int64_t shares = std::min(kShares, strips.count);
  std::vector<int64_t> starts{0};
  for (const Tensor& gradient : gradients) starts.push_back(starts.back() + gradient.numel());
  const int64_t size = starts.back();
  std::vector<T> sums(shares * size);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> rows;
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t s = share * strips.count / shares; s < (share + 1) * strips.count / shares; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        copy_with_border(x, n, first, count, rows);
        const int64_t line = (x.width + 2) * x.channels;
        for (size_t i = 0; i < dys.size(); ++i) {
          const int64_t side = gradients[i].size(2), run = side * x.channels;
          const T* corner = rows.data() + (side == 3 ? 0 : line + x.channels);
          T* sum = sums.data() + share * size + starts[i];  // for each panel [side][side · C][columns]
          for (int64_t o = 0; o < dys[i].channels;) {
            const int64_t columns = panel<T>(dys[i].channels - o);
            for (int64_t y = 0; y < side; ++y, sum += run * columns) {
              Pixels<T> pixels{corner + y * line, line,         x.channels, dys[i].at<const T>(n, o, first * x.width),
                               dys[i].pixel,      count, x.width, sum};
              add_products(pixels, run, columns);
            }
            o += columns;
          }
        }
      }
    }
  });
  for (int64_t share = 1; share < shares; ++share)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[share * size + k];
  sums.resize(size);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& gradient = gradients[i];
    T* to = static_cast<T*>(gradient.mutable_data_ptr());
    const int64_t side = gradient.size(2), outputs = gradient.size(0);
    const T* from = sums.data() + starts[i];
    for (int64_t o = 0; o < outputs;) {
      const int64_t columns = panel<T>(outputs - o);
      for (int64_t y = 0; y < side; ++y) {
        for (int64_t column = 0; column < side; ++column, from += x.channels * columns) {
          T* corner = to + o * gradient.stride(0) + y * gradient.stride(2) + column * gradient.stride(3);
          copy_strided(from, columns, 1, corner, gradient.stride(1), gradient.stride(0), x.channels, columns);
        }
      }
      o += columns;
    }
  }
}

std::vector<Tensor> convs_weight_grad(const std::vector<Tensor>& dys, const Tensor& x,
                                      const std::vector<Tensor>& weights) {
  const std::vector<FeatureMap> maps = gradients_of(dys, weights);
  const FeatureMap in = rows_of(x, "x");
  STD_TORCH_CHECK(in.same_pixels(maps.front()) && x.scalar_type() == dys.front().scalar_type(), kOp,
                  ": dys: expected dtype, batch, height and width of x");
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < maps.size(); ++i) {
    side_of(weights[i], x, maps[i].channels, in.channels);
    gradients.push_back(torch::stable::empty_like(weights[i]));
  }
  dispatch_real(x.scalar_type(), [&](auto zero) { weight_grad<decltype(zero)>(in, maps, gradients); });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("convs_forward", TORCH_BOX(&convs_forward));
  library.impl("convs_input_grad", TORCH_BOX(&convs_input_grad));
  library.impl("convs_weight_grad", TORCH_BOX(&convs_weight_grad));
}
