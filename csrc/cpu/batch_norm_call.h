// From tensors to the loops of batch_norm.h: checks, layout and dtype of a call of bn_silu (one input) or rep_bn_silu
// (two). All maps of a call are read in the layout of the first input; a map in another layout is copied first.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "cpu/batch_norm.h"

namespace yolov9_fast {

using OptionalTensor = std::optional<Tensor>;

// An input with its parameters [C] and the statistics [C] by which it is normalised.
struct Branch {
  Tensor x;
  OptionalTensor weight, bias;
  Tensor mean, rstd;
};

// The values of a vector [C] in the type of the computation.
template <typename A>
A* vector_of(const Tensor& tensor, int64_t channels, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == kScalarType<A>, name, ": expected float32 (float64 for float64 maps)");
  STD_TORCH_CHECK(tensor.numel() == channels && tensor.is_contiguous(), name, ": expected [", channels,
                  "], contiguous");
  return static_cast<A*>(tensor.data_ptr());
}

template <typename A>
A* vector_of(const OptionalTensor& tensor, int64_t channels, const char* name) {
  return tensor ? vector_of<A>(*tensor, channels, name) : nullptr;
}

template <int B>
struct Gradients {
  std::array<Tensor, B> dx, dweight;
  Tensor dbias;
};

// In 16 bits the gradient's second pass reads dy in float32 for maps of up to so many values (8 MB); beyond, it computes
// dy again from dz and x. Measured on two cores, bfloat16, channels_last, both passes with dy kept against recomputed:
// 62 and 88 us for 8 x 16 x 40 x 40, 196 and 298 us for 8 x 64 x 40 x 40, 425 and 587 us for 8 x 128 x 40 x 40.
constexpr int64_t kKeptValues = 1 << 21;

// Memory of the calling thread for so many values, aligned to a cache line. It stays with the thread: memory of the
// allocator may come with page faults, which cost more than the pass.
template <typename A>
A* scratch(int64_t values) {
  constexpr std::align_val_t line{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, line); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < values) {
    memory.reset(), size = 0;
    memory.reset(::operator new(values * sizeof(A), line)), size = values;
  }
  return static_cast<A*>(memory.get());
}

template <int B>
class Call {
 public:
  Call(const char* op, bool with_silu, std::array<Branch, B> given)
      : branches(std::move(given)), op_(op), with_silu_(with_silu), type_(branches[0].x.scalar_type()) {
    const Tensor& first = branches[0].x;
    STD_TORCH_CHECK(first.dim() == 4, op_, ": x: expected [B, C, H, W], got ", first.dim(), " dimensions");
    // Of one pixel or one channel too: rows keep more registers full.
    layout_ = row_stride(first) ? Layout::kChannelsLast : Layout::kPlanes;
    for (int b = 0; b < B; ++b) {
      if (b > 0) check_like_x(branches[b].x, "x");
      branches[b].x = readable(branches[b].x);
      inputs_[b] = feature_map(branches[b].x, op_, "x", layout_);
    }
  }

  // The batch statistics of input b and how many values of each channel they are of.
  template <typename Body>
  void statistics(int b, const Body& body) const {
    dispatch(type_, op_, "x", [&](auto zero) { body(Statistics<decltype(zero)>(inputs_[b])); });
  }

  // out = act(sum of the normalised inputs) (+ residual).
  void apply(const OptionalTensor& residual, Tensor& out) const {
    check_like_x(out, "out");
    const bool in_place = has_layout(out, layout_);
    const Tensor target = in_place ? out : empty_map(branches[0].x);
    FeatureMap added;
    OptionalTensor kept;
    if (residual) {
      check_like_x(*residual, "residual");
      kept = readable(*residual);
      added = feature_map(*kept, op_, "residual", layout_);
    }
    run([&](auto zero, auto silu) {
      using T = decltype(zero);
      yolov9_fast::apply<T, B, silu.value>(inputs_, norms<Compute<T>>(), added,
                                           feature_map(target, op_, "out", layout_));
    });
    if (!in_place) torch::stable::copy_(out, target);
  }

  // Writes the statistics of the batch into mean and rstd, updates the running statistics and applies.
  void forward(const std::array<std::array<OptionalTensor, 2>, B>& running, double momentum, double eps,
               const OptionalTensor& residual, Tensor& out) {
    const int64_t channels = inputs_[0].channels;
    for (int b = 0; b < B; ++b) {
      branches[b].mean = per_channel(), branches[b].rstd = per_channel();
      statistics(b, [&]<typename T>(const Statistics<T>& found) {
        using A = Compute<T>;
        A* mean = vector_of<A>(branches[b].mean, channels, "mean");
        A* rstd = vector_of<A>(branches[b].rstd, channels, "rstd");
        const double count = static_cast<double>(found.values);
        for (int64_t c = 0; c < channels; ++c) {
          mean[c] = static_cast<A>(found.mean[c]);
          rstd[c] = static_cast<A>(1 / std::sqrt(found.m2[c] / std::max(count, 1.0) + eps));
        }
        if (found.values == 0) return;
        const auto update = [&](const OptionalTensor& tensor, const std::vector<double>& values, double scale,
                                const char* name) {
          A* average = vector_of<A>(tensor, channels, name);
          if (!average) return;
          for (int64_t c = 0; c < channels; ++c) {
            average[c] = static_cast<A>((1 - momentum) * average[c] + momentum * scale * values[c]);
          }
        };
        update(running[b][0], found.mean, 1, "running_mean");
        update(running[b][1], found.m2, 1 / std::max(count - 1, 1.0), "running_var");
      });
    }
    apply(residual, out);
  }

  // [1 + B, C]: the sums over the batch of dy and of each dy x̂.
  Tensor sums(const Tensor& dz) const {
    check_like_x(dz, "dz");
    const Tensor gradient = readable(dz);
    Tensor result = torch::stable::new_empty(branches[0].x, {1 + B, inputs_[0].channels}, computed_in());
    run([&](auto zero, auto silu) {
      using T = decltype(zero);
      gradient_sums<T, B, silu.value, false>(feature_map(gradient, op_, "dz", layout_), inputs_, norms<Compute<T>>(),
                                             {}, static_cast<Compute<T>*>(result.mutable_data_ptr()));
    });
    return result;
  }

  // dx of each input from the means over the batch of dy and of each dy x̂.
  std::array<Tensor, B> input_gradient(const Tensor& dz, const std::array<Tensor, 1 + B>& means) const {
    check_like_x(dz, "dz");
    const Tensor gradient = readable(dz);
    const int64_t channels = inputs_[0].channels;
    std::array<Tensor, B> dx;
    const FeatureMaps<B> targets = new_gradients(dx);
    run([&](auto zero, auto silu) {
      using T = decltype(zero);
      using A = Compute<T>;
      std::vector<A> all((1 + B) * channels);
      for (int k = 0; k <= B; ++k) {
        std::copy_n(vector_of<A>(means[k], channels, "mean_dy"), channels, all.data() + k * channels);
      }
      yolov9_fast::input_gradient<T, B, silu.value, false>(feature_map(gradient, op_, "dz", layout_), inputs_,
                                                           norms<A>(), all.data(), targets);
    });
    return dx;
  }

  // Both passes, where the statistics are those of this batch.
  Gradients<B> backward(const Tensor& dz) const {
    check_like_x(dz, "dz");
    const Tensor gradient = readable(dz);
    const int64_t channels = inputs_[0].channels;
    Gradients<B> result;
    const FeatureMaps<B> targets = new_gradients(result.dx);
    for (Tensor& dweight : result.dweight) dweight = per_channel();
    result.dbias = per_channel();
    run([&](auto zero, auto silu) {
      using T = decltype(zero);
      using A = Compute<T>;
      const auto of_inputs = norms<A>();
      const FeatureMap given = feature_map(gradient, op_, "dz", layout_);
      FeatureMap kept = targets[0];
      std::vector<A> sums((1 + B) * channels);
      const auto both_passes = [&](auto keep) {
        gradient_sums<T, B, silu.value, keep.value>(given, inputs_, of_inputs, kept, sums.data());
        std::copy_n(sums.data(), channels, vector_of<A>(result.dbias, channels, "dbias"));
        for (int b = 0; b < B; ++b) {
          std::copy_n(sums.data() + (1 + b) * channels, channels, vector_of<A>(result.dweight[b], channels, "dweight"));
        }
        const A inverse = A(1) / static_cast<A>(std::max<int64_t>(given.all_pixels(), 1));
        for (A& sum : sums) sum *= inverse;
        yolov9_fast::input_gradient<T, B, silu.value, keep.value>(keep.value ? kept : given, inputs_, of_inputs,
                                                                  sums.data(), targets);
      };
      if constexpr (std::is_same_v<T, A> || !silu.value) {
        both_passes(silu);
      } else if (const int64_t values = given.all_pixels() * channels; values <= kKeptValues) {
        kept.data = scratch<A>(values);  // dx would round dy to 16 bits
        both_passes(std::true_type{});
      } else {
        both_passes(std::false_type{});
      }
    });
    return result;
  }

  Tensor per_channel() const { return torch::stable::new_empty(branches[0].x, {inputs_[0].channels}, computed_in()); }

  std::array<Branch, B> branches;

 private:
  void check_like_x(const Tensor& tensor, const char* name) const {
    const Tensor& x = branches[0].x;
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1) &&
                        tensor.size(2) == x.size(2) && tensor.size(3) == x.size(3) && tensor.scalar_type() == type_,
                    op_, ": ", name, ": expected the shape and dtype of the first input");
  }

  Tensor readable(const Tensor& tensor) const {
    return has_layout(tensor, layout_) ? tensor : torch::stable::contiguous(tensor, memory_format(layout_));
  }

  FeatureMaps<B> new_gradients(std::array<Tensor, B>& dx) const {
    FeatureMaps<B> maps;
    for (int b = 0; b < B; ++b) {
      dx[b] = empty_map(branches[0].x);
      maps[b] = feature_map(dx[b], op_, "dx", layout_);
    }
    return maps;
  }

  ScalarType computed_in() const { return type_ == ScalarType::Double ? type_ : ScalarType::Float; }

  // Calls body(T{}, flag) for the dtype of the inputs and whether SiLU follows.
  template <typename Body>
  void run(const Body& body) const {
    dispatch(type_, op_, "x",
             [&](auto zero) { with_silu_ ? body(zero, std::true_type{}) : body(zero, std::false_type{}); });
  }

  template <typename A>
  std::array<Norm<A>, B> norms() const {
    const int64_t channels = inputs_[0].channels;
    std::array<Norm<A>, B> all;
    for (int b = 0; b < B; ++b) {
      const Branch& branch = branches[b];
      all[b] = {vector_of<A>(branch.mean, channels, "mean"), vector_of<A>(branch.rstd, channels, "rstd"),
                vector_of<A>(branch.weight, channels, "weight"), vector_of<A>(branch.bias, channels, "bias")};
    }
    return all;
  }

  const char* op_;
  bool with_silu_;
  ScalarType type_;
  Layout layout_;
  FeatureMaps<B> inputs_;
};

}  // namespace yolov9_fast
