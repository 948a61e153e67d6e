// From tensors to the loops of batch_norm.h: checks, layouts, element types; for one input (bn_silu) or two (rep_bn_silu).
#pragma once

#include "cpu/batch_norm.h"

#include <cmath>

namespace yolov9_fast {

using OptionalTensor = std::optional<Tensor>;

struct Branch {
  Tensor x;
  OptionalTensor weight, bias;
};

template <typename Body>
void by_type(ScalarType type, const char* op, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, op, ": x must be float32, float64, bfloat16 or float16");
  }
}

template <typename Body>
void by_flag(bool flag, const Body& body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

inline ScalarType computed_in(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// A vector [C] in the type of the computation.
template <typename A>
A* vector_of(const Tensor& tensor, int64_t channels, const char* name) {
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be float32 (float64 for float64 maps)");
  STD_TORCH_CHECK(tensor.numel() == channels && tensor.is_contiguous(), name, " must be contiguous with one value per channel");
  return static_cast<A*>(tensor.data_ptr());
}

template <typename A>
A* vector_of(const OptionalTensor& tensor, int64_t channels, const char* name) {
  return tensor ? vector_of<A>(*tensor, channels, name) : nullptr;
}

// One call: its inputs in one layout.
template <int B>
struct Call {
  Call(const char* op, std::array<Branch, B> given) : op(op), branches(std::move(given)), map(branches[0].x) {
    type = branches[0].x.scalar_type();
    for (Branch& branch : branches) branch.x = readable(branch.x, "x");
  }

  Tensor readable(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(map.same_shape(x) && x.scalar_type() == type, op, ": ", name, " must have the shape and type of the first input");
    return map.readable(x);
  }

  Tensor per_channel() const { return torch::stable::new_empty(branches[0].x, {map.channels}, computed_in(type)); }

  template <typename T>
  Inputs<T, B> inputs() const {
    Inputs<T, B> all;
    for (int b = 0; b < B; ++b) all[b] = reading<T>(map, branches[b].x);
    return all;
  }

  template <typename A>
  std::array<Norm<A>, B> norms(const std::array<Tensor, B>& mean, const std::array<Tensor, B>& rstd) const {
    std::array<Norm<A>, B> all;
    for (int b = 0; b < B; ++b) {
      all[b] = {vector_of<A>(mean[b], map.channels, "mean"), vector_of<A>(rstd[b], map.channels, "rstd"),
                vector_of<A>(branches[b].weight, map.channels, "weight"),
                vector_of<A>(branches[b].bias, map.channels, "bias")};
    }
    return all;
  }

  const char* op;
  std::array<Branch, B> branches;
  FeatureMap map;
  ScalarType type;
};

template <int B>
void apply_call(const Call<B>& call, const std::array<Tensor, B>& mean, const std::array<Tensor, B>& rstd,
                const OptionalTensor& residual, Tensor& out, bool with_silu) {
  STD_TORCH_CHECK(call.map.same_shape(out) && out.scalar_type() == call.type, call.op, ": out must have the shape and type of x");
  const bool direct = call.map.fits(out);
  Tensor target = direct ? out : call.map.empty_like(out);
  const OptionalTensor added = residual ? OptionalTensor(call.readable(*residual, "residual")) : std::nullopt;
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    const auto norms = call.template norms<Compute<T>>(mean, rstd);
    const Access<const T> extra = added ? reading<T>(call.map, *added) : Access<const T>{};
    by_flag(with_silu, [&](auto flag) {
      apply<T, B, flag.value>(call.map, call.template inputs<T>(), norms, extra, writing<T>(call.map, target));
    });
  });
  if (!direct) torch::stable::copy_(out, target);
}

// Statistics of the batch into mean and rstd, running statistics updated, out written.
template <int B>
void forward_call(const Call<B>& call, const std::array<std::array<OptionalTensor, 2>, B>& running, double momentum,
                  double eps, const OptionalTensor& residual, Tensor& out, bool with_silu, std::array<Tensor, B>& mean,
                  std::array<Tensor, B>& rstd) {
  const int64_t channels = call.map.channels;
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    for (int b = 0; b < B; ++b) {
      const Statistics<T> statistics(call.map, call.branches[b].x);
      mean[b] = call.per_channel(), rstd[b] = call.per_channel();
      A *mean_of = vector_of<A>(mean[b], channels, "mean"), *rstd_of = vector_of<A>(rstd[b], channels, "rstd");
      const double count = static_cast<double>(statistics.values);
      for (int64_t c = 0; c < channels; ++c) {
        mean_of[c] = static_cast<A>(statistics.mean[c]);
        rstd_of[c] = static_cast<A>(1 / std::sqrt(statistics.m2[c] / std::max(count, 1.0) + eps));
      }
      if (statistics.values == 0) continue;
      const auto update = [&](const OptionalTensor& tensor, const std::vector<double>& values, double scale, const char* name) {
        A* running_of = vector_of<A>(tensor, channels, name);
        if (!running_of) return;
        for (int64_t c = 0; c < channels; ++c) {
          running_of[c] = static_cast<A>((1 - momentum) * running_of[c] + momentum * scale * values[c]);
        }
      };
      update(running[b][0], statistics.mean, 1, "running_mean");
      update(running[b][1], statistics.m2, 1 / std::max(count - 1, 1.0), "running_var");
    }
  });
  apply_call<B>(call, mean, rstd, residual, out, with_silu);
}

template <int B>
Tensor sums_call(const Call<B>& call, const Tensor& dz, const std::array<Tensor, B>& mean,
                 const std::array<Tensor, B>& rstd, bool with_silu) {
  const Tensor gradient = call.readable(dz, "dz");
  Tensor sums = torch::stable::new_empty(call.branches[0].x, {1 + B, call.map.channels}, computed_in(call.type));
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    by_flag(with_silu, [&](auto flag) {
      gradient_sums<T, B, flag.value, false>(call.map, reading<T>(call.map, gradient), call.template inputs<T>(),
                                             call.template norms<Compute<T>>(mean, rstd), {},
                                             static_cast<Compute<T>*>(sums.mutable_data_ptr()));
    });
  });
  return sums;
}

// dx of each input, given the means over the batch of dy and of each dy x̂.
template <int B>
std::array<Tensor, B> input_gradient_call(const Call<B>& call, const Tensor& dz, const std::array<Tensor, B>& mean,
                                          const std::array<Tensor, B>& rstd,
                                          const std::array<Tensor, 1 + B>& means, bool with_silu) {
  const Tensor gradient = call.readable(dz, "dz");
  const int64_t channels = call.map.channels;
  std::array<Tensor, B> dx;
  for (int b = 0; b < B; ++b) dx[b] = call.map.empty_like(call.branches[b].x);
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    std::vector<A> all((1 + B) * channels);
    for (int k = 0; k <= B; ++k) std::copy_n(vector_of<A>(means[k], channels, "mean_dy"), channels, all.data() + k * channels);
    std::array<Access<T>, B> targets;
    for (int b = 0; b < B; ++b) targets[b] = writing<T>(call.map, dx[b]);
    by_flag(with_silu, [&](auto flag) {
      input_gradient<T, B, flag.value, false>(call.map, reading<T>(call.map, gradient), call.template inputs<T>(),
                                              call.template norms<A>(mean, rstd), all.data(), targets);
    });
  });
  return dx;
}

template <int B>
struct Gradients {
  std::array<Tensor, B> dx, dweight;
  Tensor dbias;
};

// Both passes, for statistics of this very batch.
template <int B>
Gradients<B> backward_call(const Call<B>& call, const Tensor& dz, const std::array<Tensor, B>& mean,
                           const std::array<Tensor, B>& rstd, bool with_silu) {
  const Tensor gradient = call.readable(dz, "dz");
  const int64_t channels = call.map.channels;
  Gradients<B> result;
  for (int b = 0; b < B; ++b) {
    result.dx[b] = call.map.empty_like(call.branches[b].x);
    result.dweight[b] = call.per_channel();
  }
  result.dbias = call.per_channel();
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const auto norms = call.template norms<A>(mean, rstd);
    const auto inputs = call.template inputs<T>();
    std::array<Access<T>, B> targets;
    for (int b = 0; b < B; ++b) targets[b] = writing<T>(call.map, result.dx[b]);
    std::vector<A> sums((1 + B) * channels);
    Access<const T> dz_of = reading<T>(call.map, gradient);
    by_flag(with_silu, [&](auto flag) {
      // In 16 bits dy would lose digits on the way through dx.
      constexpr bool keep = flag.value && std::is_same_v<T, A>;
      gradient_sums<T, B, flag.value, keep>(call.map, dz_of, inputs, norms, targets[0], sums.data());
      std::copy_n(sums.data(), channels, vector_of<A>(result.dbias, channels, "dbias"));
      for (int b = 0; b < B; ++b) {
        std::copy_n(sums.data() + (1 + b) * channels, channels, vector_of<A>(result.dweight[b], channels, "dweight"));
      }
      const A inverse = A(1) / static_cast<A>(std::max<int64_t>(call.map.count(), 1));
      for (A& sum : sums) sum *= inverse;
      if constexpr (keep) {
        dz_of = {};
        dz_of.data = targets[0].data, dz_of.row = targets[0].row;
        dz_of.batch = targets[0].batch, dz_of.channel = targets[0].channel;
      }
      input_gradient<T, B, flag.value, keep>(call.map, dz_of, inputs, norms, sums.data(), targets);
    });
  });
  return result;
}

}  // namespace yolov9_fast
