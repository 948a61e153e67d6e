// 3×3 and 1×1 convolutions of one map of few channels on the CPU (stride 1, zero padding k / 2), channels_last: products of
// rows, as each pixel's 3×3 neighbourhood is three runs of adjacent numbers in a copy of the map with a border of zeros.
// The copy is of a few rows at a time, which stay in the first-level cache. float32, float64 and bfloat16.
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
void dispatch_type(ScalarType type, const Body& body) {
  if (type == ScalarType::Float) return body(float{});
  if (type == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(type == ScalarType::BFloat16, kOp, ": expected float32, float64 or bfloat16");
  return body(BFloat16{});
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
void copy_with_border(const FeatureMap& map, int64_t n, int64_t first, int64_t count, std::vector<Element<T>>& to) {
  const int64_t channels = map.channels, line = (map.width + 2) * channels;
  to.resize((count + 2) * line / ElementOf<T>::numbers);
  T* out = reinterpret_cast<T*>(to.data());
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
template <class From, class To>
#if defined(__GNUC__) && !defined(__clang__)
[[gnu::noinline, gnu::optimize("no-tree-vectorize")]]
#endif
void copy_strided(const From* from, int64_t from_row, int64_t from_column, To* to, int64_t to_row, int64_t to_column,
                  int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      to[r * to_row + c * to_column] = static_cast<To>(from[r * from_row + c * from_column]);
}

Pair pair(BFloat16 first, BFloat16 second) {
  return {static_cast<uint32_t>(first.x) | static_cast<uint32_t>(second.x) << 16};
}

// The inputs of a tap of the weight, [inputs][columns]: numbers, or pairs of inputs.
template <class T>
void pack(const T* from, int64_t in_step, int64_t out_step, Element<T>* to, int64_t inputs, int64_t columns) {
  if constexpr (ElementOf<T>::numbers == 1) {
    copy_strided(from, in_step, out_step, to, columns, 1, inputs, columns);
  } else {
    for (int64_t i = 0; i + 1 < inputs; i += 2)
      for (int64_t o = 0; o < columns; ++o)
        *to++ = pair(from[i * in_step + o * out_step], from[(i + 1) * in_step + o * out_step]);
  }
}

// One convolution by packed weights: for each panel of outputs [k][k · inputs][columns of the panel].
template <class T>
struct Packed {
  using E = Element<T>;
  static constexpr int64_t kNumbers = ElementOf<T>::numbers;
  int64_t side, inputs, outputs;
  std::vector<E> values;

  // `transposed`: of the gradient of the input, which convolves by the kernels mirrored, outputs and inputs exchanged.
  Packed(const Tensor& weight, bool transposed)
      : side(weight.size(2)), inputs(weight.size(transposed ? 0 : 1)), outputs(weight.size(transposed ? 1 : 0)) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    const int64_t out_step = weight.stride(transposed ? 1 : 0), in_step = weight.stride(transposed ? 0 : 1);
    const int64_t y_step = weight.stride(2), x_step = weight.stride(3);
    values.resize(side * side * inputs * outputs / kNumbers);
    E* to = values.data();
    for (int64_t o = 0; o < outputs; o += panel<Sum<E>>(outputs - o)) {
      const int64_t columns = panel<Sum<E>>(outputs - o);
      for (int64_t y = 0; y < side; ++y) {
        for (int64_t x = 0; x < side; ++x) {
          const T* corner = from + (transposed ? side - 1 - y : y) * y_step + (transposed ? side - 1 - x : x) * x_step;
          pack(corner + o * out_step, in_step, out_step, to, inputs, columns);
          to += inputs / kNumbers * columns;
        }
      }
    }
  }

  // Writes, or adds, what belongs to `count` rows from `first` on of image n; `map` is their copy with a border.
  void write(const std::vector<E>& map, const FeatureMap& out, int64_t n, int64_t first, int64_t count, bool add) const {
    const int64_t pixel = inputs / kNumbers, line = (out.width + 2) * pixel, border = side == 3 ? 0 : line + pixel;
    const E* weights = values.data();
    for (int64_t o = 0; o < outputs;) {
      const int64_t columns = panel<Sum<E>>(outputs - o);
      for (int64_t y = 0; y < count; ++y) {
        Rows<T> rows{map.data() + border + y * line,           pixel, line,      side, side * pixel, weights,
                     out.at<T>(n, o, (first + y) * out.width), out.pixel, add};
        multiply_rows(rows, out.width, columns);
      }
      weights += side * side * pixel * columns;
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
  dispatch_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Packed<T>> all = packed<T>(weights, false);
    const Strips strips(in, in.channels, sizeof(T));
    torch::stable::parallel_for(0, strips.count, grain(strips, in, outputs), [&](int64_t begin, int64_t end) {
      std::vector<Element<T>> rows;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        copy_with_border<T>(in, n, first, count, rows);
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
  dispatch_type(gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Packed<T>> all = packed<T>(weights, true);
    const Strips strips(in.front(), widest, sizeof(T));
    torch::stable::parallel_for(0, strips.count, grain(strips, in.front(), channels), [&](int64_t begin, int64_t end) {
      std::vector<Element<T>> rows;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        for (size_t i = 0; i < all.size(); ++i) {
          copy_with_border<T>(in[i], n, first, count, rows);
          all[i].write(rows, out, n, first, count, i > 0);
        }
      }
    });
  });
  return gradient;
}

// What the sums over pixels multiply, in a strip: numbers where they are; of bfloat16, each with that of the next pixel.
template <class T>
struct Operands {
  using E = Element<T>;
  static constexpr int64_t kNumbers = ElementOf<T>::numbers;
  std::vector<E> rows, a, b;

  void read_map(const FeatureMap& x, int64_t n, int64_t first, int64_t count) {
    copy_with_border<T>(x, n, first, count, rows);
    if constexpr (kNumbers == 2) {
      const int64_t line = (x.width + 2) * x.channels;
      const BFloat16* from = reinterpret_cast<const BFloat16*>(rows.data());
      a.resize((count + 2) * line);
      Pair* to = a.data();
      for (int64_t y = 0; y < count + 2; ++y, from += line, to += line) {
        for (int64_t k = 0; k < line - x.channels; ++k) to[k] = pair(from[k], from[k + x.channels]);
        for (int64_t k = line - x.channels; k < line; ++k) to[k] = pair(from[k], BFloat16(0));
      }
    }
  }

  void read_gradient(const FeatureMap& dy, int64_t n, int64_t first, int64_t count) {
    if constexpr (kNumbers == 2) {
      const int64_t steps = (dy.width + 1) / 2;
      b.resize(count * steps * dy.channels);
      Pair* to = b.data();
      for (int64_t y = 0; y < count; ++y) {
        for (int64_t p = 0; p < dy.width; p += 2, to += dy.channels) {
          const BFloat16* from = dy.at<const BFloat16>(n, 0, (first + y) * dy.width + p);
          const BFloat16* next = from + dy.pixel;
          if (p + 1 < dy.width) {
            for (int64_t c = 0; c < dy.channels; ++c) to[c] = pair(from[c], next[c]);
          } else {
            for (int64_t c = 0; c < dy.channels; ++c) to[c] = pair(from[c], BFloat16(0));
          }
        }
      }
    }
  }

  // Taps of line y of the kernel for outputs from o on, added to `sum`.
  Pixels<E> pixels(const FeatureMap& x, const FeatureMap& dy, int64_t side, int64_t y, int64_t n, int64_t o,
                   int64_t first, int64_t count, Sum<E>* sum) const {
    const int64_t line = (x.width + 2) * x.channels, corner = (side == 3 ? 0 : line + x.channels) + y * line;
    if constexpr (kNumbers == 2) {
      return {a.data() + corner, line, 2 * x.channels, b.data() + o, dy.channels, count, (x.width + 1) / 2, sum};
    } else {
      return {rows.data() + corner, line,    x.channels, dy.at<const T>(n, o, first * x.width), dy.pixel, count,
              x.width,              sum};
    }
  }
};

// A weight's gradient is a sum over pixels: those of a strip are summed from zero (small rounding error), the strips of
// a share are added in order, and so are the shares. Both depend on the shape alone, so any number of threads gives the
// same bits.
constexpr int64_t kShares = 8;

template <class T>
void weight_grad(const FeatureMap& x, const std::vector<FeatureMap>& dys, const std::vector<Tensor>& gradients) {
  using S = Sum<Element<T>>;
  const Strips strips(x, x.channels, sizeof(Element<T>));
  const int64_t shares = std::min(kShares, strips.count);
  std::vector<int64_t> starts{0};
  for (const Tensor& gradient : gradients) starts.push_back(starts.back() + gradient.numel());
  const int64_t size = starts.back();
  std::vector<S> sums(shares * size);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    Operands<T> operands;
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t s = share * strips.count / shares; s < (share + 1) * strips.count / shares; ++s) {
        const int64_t n = strips.image(s), first = strips.first(s), count = strips.extent(s);
        operands.read_map(x, n, first, count);
        for (size_t i = 0; i < dys.size(); ++i) {
          operands.read_gradient(dys[i], n, first, count);
          const int64_t side = gradients[i].size(2), run = side * x.channels;
          S* sum = sums.data() + share * size + starts[i];  // for each panel [side][side · C][columns]
          for (int64_t o = 0; o < dys[i].channels;) {
            const int64_t columns = panel<S>(dys[i].channels - o);
            for (int64_t y = 0; y < side; ++y, sum += run * columns)
              add_products(operands.pixels(x, dys[i], side, y, n, o, first, count, sum), run, columns);
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
    const S* from = sums.data() + starts[i];
    for (int64_t o = 0; o < outputs;) {
      const int64_t columns = panel<S>(outputs - o);
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
  dispatch_type(x.scalar_type(), [&](auto zero) { weight_grad<decltype(zero)>(in, maps, gradients); });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("convs_forward", TORCH_BOX(&convs_forward));
  library.impl("convs_input_grad", TORCH_BOX(&convs_input_grad));
  library.impl("convs_weight_grad", TORCH_BOX(&convs_weight_grad));
}
