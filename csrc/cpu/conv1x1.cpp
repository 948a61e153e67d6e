// 1×1 convolution of the concatenation of several maps on the CPU, as a matrix product over pixels that reads the maps
// (or channel slices) without a copy. Reads inputs and weight once, writes the output once; the tile is in cpu/gemm.h.
// float32 and float64.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/feature_map.h"
#include "cpu/gemm.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::gemm;

constexpr char kOp[] = "conv1x1";
// Pixels of a task: a multiple of the tile's rows; their input rows stay in the second-level cache.
constexpr int64_t kPixelBlock = 96;

template <class Body>
void dispatch_real(ScalarType type, const Body& body) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp,
                  ": inputs, weight, dy: expected float32 or float64");
  if (type == ScalarType::Float) return body(float{});
  return body(double{});
}

// Maps of one layout, concatenated along the channels.
struct Maps {
  std::vector<FeatureMap> parts;
  int64_t channels = 0;

  const FeatureMap& first() const { return parts.front(); }
  Layout layout() const { return first().layout; }
  bool channels_last() const { return first().channels_last(); }
};

// All maps of a call; the layout of one alone may be ambiguous.
std::vector<Tensor> with(std::vector<Tensor> tensors, const Tensor& other) {
  tensors.push_back(other);
  for (const Tensor& x : tensors) STD_TORCH_CHECK(x.dim() == 4, kOp, ": expected [B, C, H, W], got ", x.dim(), " dimensions");
  return tensors;
}

Maps concatenated(const std::vector<Tensor>& tensors, const char* name, std::optional<Layout> layout = std::nullopt) {
  STD_TORCH_CHECK(!tensors.empty(), kOp, ": ", name, ": expected at least one tensor, got none");
  Maps maps;
  for (const Tensor& tensor : tensors) {
    maps.parts.push_back(feature_map(tensor, kOp, name, maps.parts.empty() ? layout : maps.layout()));
    const FeatureMap& map = maps.parts.back();
    STD_TORCH_CHECK(map.same_pixels(maps.first()) && tensor.scalar_type() == tensors.front().scalar_type(), kOp, ": ",
                    name, ": expected tensors of one dtype, batch, height and width");
    maps.channels += map.channels;
  }
  return maps;
}

// A matrix [rows, columns] with any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

template <class T>
struct Panels {
  std::vector<T> values;
  std::vector<int64_t> first;  // of each map: where its first panel starts

  // A panel holds the weights of up to kPanel outputs: [inputs][kPanel], zeros after the last output.
  void pack(const Matrix<T>& weight, int64_t inputs, const Maps& outputs) {
    constexpr int64_t width = kPanel<T>;
    struct Panel {
      int64_t output, count, at;
    };
    std::vector<Panel> list;
    int64_t size = 0, output = 0;
    for (const FeatureMap& map : outputs.parts) {
      first.push_back(size);
      for (int64_t c = 0; c < map.channels; c += width, size += inputs * width)
        list.push_back({output + c, std::min(width, map.channels - c), size});
      output += map.channels;
    }
    values.resize(size);
    T* packed = values.data();
    torch::stable::parallel_for(0, list.size(), 1 + 65536 / (inputs * width + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Panel panel = list[i];
        T* to = packed + panel.at;
        std::fill(to, to + inputs * width, T(0));
        const T* from = weight.data + panel.output * weight.row;
        if (weight.column == 1) {
          for (int64_t o = 0; o < panel.count; ++o)
            for (int64_t k = 0; k < inputs; ++k) to[k * width + o] = from[o * weight.row + k];
        } else {
          for (int64_t k = 0; k < inputs; ++k)
            for (int64_t o = 0; o < panel.count; ++o) to[k * width + o] = from[o * weight.row + k * weight.column];
        }
      }
    });
  }
};

// outputs[:, o] = Σ_k weight[o, k] · inputs[:, k] (+ bias[o]), in channels_last: pixels are rows of A.
template <class T>
void product_of_rows(const Maps& inputs, const Matrix<T>& weight, const T* bias, const Maps& outputs) {
  constexpr int64_t width = kPanel<T>;
  Panels<T> panels;
  panels.pack(weight, inputs.channels, outputs);
  std::vector<T> padded_bias;
  if (bias != nullptr) {
    padded_bias.assign(bias, bias + outputs.channels);
    padded_bias.resize(outputs.channels + width);
  }
  const int64_t pixels = inputs.first().batch * inputs.first().pixels();
  torch::stable::parallel_for(0, (pixels + kPixelBlock - 1) / kPixelBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = block * kPixelBlock, rows = std::min(kPixelBlock, pixels - from);
      int64_t output = 0;
      for (size_t m = 0; m < outputs.parts.size(); ++m) {
        const FeatureMap& out = outputs.parts[m];
        for (int64_t c = 0; c < out.channels; c += width) {
          const T* panel = panels.values.data() + panels.first[m] + c * inputs.channels;
          for (const FeatureMap& in : inputs.parts) {
            Product<T> product{in.channels, in.at<const T>(0, 0, from), in.pixel, 1, panel,
                               width,       out.at<T>(0, c, from),      out.pixel};
            product.accumulate = &in != inputs.parts.data();
            if (bias != nullptr) product.column_start = padded_bias.data() + output + c;
            multiply(product, rows, std::min(width, out.channels - c));
            panel += in.channels * width;
          }
        }
        output += out.channels;
      }
    }
  });
}

// The same in planes: pixels are columns of B, packed once per block of a panel's width.
template <class T>
void product_of_planes(const Maps& inputs, const Matrix<T>& weight, const T* bias, const Maps& outputs) {
  constexpr int64_t width = kPanel<T>;
  const int64_t pixels = inputs.first().pixels(), blocks = (pixels + width - 1) / width;
  torch::stable::parallel_for(0, inputs.first().batch * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> packed(inputs.channels * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, from = task % blocks * width, columns = std::min(width, pixels - from);
      T* to = packed.data();
      for (const FeatureMap& in : inputs.parts) {
        for (int64_t c = 0; c < in.channels; ++c, to += width) {
          std::memcpy(to, in.at<const T>(n, c, from), columns * sizeof(T));
          std::fill(to + columns, to + width, T(0));
        }
      }
      int64_t output = 0;
      for (const FeatureMap& out : outputs.parts) {
        Product<T> product{inputs.channels,
                           weight.data + output * weight.row,
                           weight.row,
                           weight.column,
                           packed.data(),
                           width,
                           out.at<T>(n, 0, from),
                           out.channel};
        if (bias != nullptr) product.row_start = bias + output;
        multiply(product, out.channels, columns);
        output += out.channels;
      }
    }
  });
}

template <class T>
void product(const Maps& inputs, const Matrix<T>& weight, const T* bias, const Maps& outputs) {
  if (outputs.first().empty() || inputs.channels == 0) return;
  if (inputs.channels_last()) return product_of_rows(inputs, weight, bias, outputs);
  product_of_planes(inputs, weight, bias, outputs);
}

// weight [O, K, 1, 1] with any strides.
template <class T>
Matrix<T> matrix_of(const Tensor& weight) {
  return {static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1)};
}

void check_weight(const Tensor& weight, const Tensor& like, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == inputs && weight.size(2) == 1 &&
                      weight.size(3) == 1,
                  kOp, ": weight: expected [", outputs, ", ", inputs, ", 1, 1]");
  STD_TORCH_CHECK(weight.scalar_type() == like.scalar_type(), kOp, ": weight: expected the dtype of the maps");
}

void conv1x1_forward(const std::vector<Tensor>& inputs, const Tensor& weight, const std::optional<Tensor>& bias,
                     Tensor out) {
  const Maps in = concatenated(inputs, "inputs", common_layout(with(inputs, out)));
  const Maps result = concatenated({out}, "out", in.layout());
  STD_TORCH_CHECK(result.first().same_pixels(in.first()) && out.scalar_type() == inputs.front().scalar_type(), kOp,
                  ": out: expected dtype, batch, height and width of inputs");
  check_weight(weight, out, result.channels, in.channels);
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->dim() == 1 && bias->size(0) == result.channels &&
                            (bias->size(0) < 2 || bias->stride(0) == 1) && bias->scalar_type() == out.scalar_type()),
      kOp, ": bias: expected [", result.channels, "], contiguous, of the weight's dtype");
  dispatch_real(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    product<T>(in, matrix_of<T>(weight), bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
               result);
  });
}

std::vector<Tensor> conv1x1_input_grad(const Tensor& dy, const Tensor& weight, const std::vector<int64_t>& channels) {
  const Maps in = concatenated({dy}, "dy");
  const FeatureMap& map = in.first();
  std::vector<Tensor> gradients;
  for (const int64_t count : channels) gradients.push_back(empty_map(dy, count, map.height, map.width));
  const Maps out = concatenated(gradients, "channels", in.layout());
  check_weight(weight, dy, in.channels, out.channels);
  dispatch_real(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> w = matrix_of<T>(weight);
    product<T>(in, Matrix<T>{w.data, w.column, w.row}, nullptr, out);
  });
  return gradients;
}

// The weight's gradient is a sum over pixels: runs of kRun pixels are summed from zero (small rounding error, inputs in
// the cache), the runs of a share are added in order, and so are the shares. Shares depend on the shape alone, so any
// number of threads gives the same bits.
constexpr int64_t kRun = 128;
constexpr int64_t kShares = 8;

template <class T>
struct Runs {
  const Maps& dy;
  const Maps& inputs;
  int64_t inputs_padded;  // columns of a share: the channels of every map padded to full panels

  int64_t per_image() const { return (dy.first().pixels() + kRun - 1) / kRun; }
  int64_t count() const {
    // In channels_last a run may span two images.
    return dy.channels_last() ? (dy.first().batch * dy.first().pixels() + kRun - 1) / kRun
                              : dy.first().batch * per_image();
  }

  // share [outputs][inputs_padded] += dyᵀ · inputs over the pixels of run `index`.
  void add(int64_t index, T* share, std::vector<T>& columns) const {
    constexpr int64_t width = kPanel<T>;
    const FeatureMap& d = dy.first();
    const int64_t n = dy.channels_last() ? 0 : index / per_image();
    const int64_t from = (dy.channels_last() ? index : index % per_image()) * kRun;
    const int64_t length = std::min(kRun, (dy.channels_last() ? d.batch * d.pixels() : d.pixels()) - from);
    for (const FeatureMap& in : inputs.parts) {
      for (int64_t c = 0; c < in.channels; c += width, share += width) {
        const int64_t count = std::min(width, in.channels - c);
        const T* b = in.at<const T>(n, c, from);
        int64_t step = in.pixel;
        // Packed: rows that end within a vector, and planes, whose channels are not adjacent. Also rows at a distance
        // of a power of two, which share few sets of the first-level cache, if many outputs read them.
        if (!dy.channels_last() || count % kLanes<T> != 0 || (kTileVectors == 4 && count == 3 * kLanes<T>) ||
            (dy.channels >= 64 && step * sizeof(T) % 1024 == 0)) {
          columns.resize(kRun * width);
          if (dy.channels_last()) {
            for (int64_t p = 0; p < length; ++p) {
              std::memcpy(&columns[p * width], b + p * step, count * sizeof(T));
              std::fill(&columns[p * width] + count, &columns[p * width] + width, T(0));
            }
          } else {
            transpose(in, n, c, from, length, count, columns.data());
          }
          b = columns.data();
          step = width;
        }
        Product<T> product{length, d.at<const T>(n, 0, from), d.channel, d.pixel, b, step, share, inputs_padded};
        product.accumulate = true;
        accumulate_from_zero(product, dy.channels, count);
      }
    }
  }

  static void transpose(const FeatureMap& in, int64_t n, int64_t c, int64_t from, int64_t length, int64_t count,
                        T* to) {
    constexpr int64_t width = kPanel<T>, block = 16;
    for (int64_t p = 0; p < length; p += block) {
      const int64_t stop = std::min(length, p + block);
      for (int64_t k = 0; k < count; ++k) {
        const T* source = in.at<const T>(n, c + k, from);
        for (int64_t q = p; q < stop; ++q) to[q * width + k] = source[q];
      }
      for (int64_t q = p; q < stop; ++q) std::fill(to + q * width + count, to + (q + 1) * width, T(0));
    }
  }

  // The sum of a run starts at zero and is added to the share once: a long sum loses digits.
  static void accumulate_from_zero(const Product<T>& product, int64_t rows, int64_t columns) {
    constexpr int64_t height = 24, width = kPanel<T>;
    T sums[height * width];
    const int64_t whole = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t r = 0; r < rows; r += height) {
      const int64_t count = std::min(height, rows - r);
      Product<T> part = product;
      part.a += r * part.a_row;
      part.c = sums;
      part.c_row = width;
      part.accumulate = false;
      multiply(part, count, whole);
      for (int64_t i = 0; i < count; ++i) {
        T* to = product.c + (r + i) * product.c_row;
        for (int64_t k = 0; k < whole; ++k) to[k] += sums[i * width + k];
      }
    }
  }
};

template <class T>
void weight_grad(const Maps& dy, const Maps& inputs, T* result) {
  constexpr int64_t width = kPanel<T>;
  int64_t padded = 0;
  for (const FeatureMap& in : inputs.parts) padded += (in.channels + width - 1) / width * width;
  const Runs<T> runs{dy, inputs, padded};
  const int64_t count = runs.count(), shares = std::min(kShares, count), size = dy.channels * padded;
  std::vector<T> sums(shares * size);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> columns;
    for (int64_t s = begin; s < end; ++s)
      for (int64_t run = s * count / shares; run < (s + 1) * count / shares; ++run)
        runs.add(run, sums.data() + s * size, columns);
  });
  torch::stable::parallel_for(0, dy.channels, 1 + 32768 / (shares * inputs.channels + 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t o = begin; o < end; ++o) {
                                  int64_t from = o * padded, to = o * inputs.channels;
                                  for (const FeatureMap& in : inputs.parts) {
                                    for (int64_t k = 0; k < in.channels; ++k) {
                                      T sum = 0;
                                      for (int64_t s = 0; s < shares; ++s) sum += sums[s * size + from + k];
                                      result[to + k] = sum;
                                    }
                                    from += (in.channels + width - 1) / width * width;
                                    to += in.channels;
                                  }
                                }
                              });
}

Tensor conv1x1_weight_grad(const Tensor& dy, const std::vector<Tensor>& inputs) {
  const Maps in = concatenated(inputs, "inputs", common_layout(with(inputs, dy)));
  const Maps d = concatenated({dy}, "dy", in.layout());
  STD_TORCH_CHECK(d.first().same_pixels(in.first()) && dy.scalar_type() == inputs.front().scalar_type(), kOp,
                  ": dy: expected dtype, batch, height and width of inputs");
  if (d.first().empty() || in.channels == 0) return torch::stable::new_zeros(dy, {d.channels, in.channels, 1, 1});
  Tensor gradient = torch::stable::new_empty(dy, {d.channels, in.channels, 1, 1});
  dispatch_real(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    weight_grad<T>(d, in, static_cast<T*>(gradient.mutable_data_ptr()));
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("conv1x1_forward", TORCH_BOX(&conv1x1_forward));
  library.impl("conv1x1_input_grad", TORCH_BOX(&conv1x1_input_grad));
  library.impl("conv1x1_weight_grad", TORCH_BOX(&conv1x1_weight_grad));
}
