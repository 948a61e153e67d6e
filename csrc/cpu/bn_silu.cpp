// bn_silu on the CPU: batch statistics, normalise + SiLU (+ residual) and the gradient; the loops are in batch_norm.h.
#include "cpu/batch_norm_call.h"

#include <tuple>

namespace {

using namespace yolov9_fast;

std::tuple<Tensor, Tensor> forward(const Tensor& x, OptionalTensor weight, OptionalTensor bias,
                                   OptionalTensor running_mean, OptionalTensor running_var, double momentum, double eps,
                                   OptionalTensor residual, Tensor out, bool silu) {
  const Call<1> call("bn_silu_forward", {{{x, weight, bias}}});
  std::array<Tensor, 1> mean, rstd;
  forward_call<1>(call, {{{running_mean, running_var}}}, momentum, eps, residual, out, silu, mean, rstd);
  return {mean[0], rstd[0]};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dz, const Tensor& x, OptionalTensor weight,
                                            OptionalTensor bias, const Tensor& mean, const Tensor& rstd, bool silu) {
  const Call<1> call("bn_silu_backward", {{{x, weight, bias}}});
  const Gradients<1> gradients = backward_call<1>(call, dz, {mean}, {rstd}, silu);
  return {gradients.dx[0], gradients.dweight[0], gradients.dbias};
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  const Call<1> call("bn_stats", {{{x, std::nullopt, std::nullopt}}});
  Tensor mean = call.per_channel(), m2 = call.per_channel();
  by_type(call.type, call.op, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const Statistics<T> statistics(call.map, call.branches[0].x);
    std::copy_n(statistics.mean.data(), call.map.channels, vector_of<A>(mean, call.map.channels, "mean"));
    std::copy_n(statistics.m2.data(), call.map.channels, vector_of<A>(m2, call.map.channels, "m2"));
  });
  return {mean, m2};
}

void apply_given(const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean, const Tensor& rstd,
                 OptionalTensor residual, Tensor out, bool silu) {
  apply_call<1>(Call<1>("bn_silu_apply", {{{x, weight, bias}}}), {mean}, {rstd}, residual, out, silu);
}

Tensor backward_sums(const Tensor& dz, const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                     const Tensor& rstd, bool silu) {
  return sums_call<1>(Call<1>("bn_silu_backward_sums", {{{x, weight, bias}}}), dz, {mean}, {rstd}, silu);
}

Tensor backward_apply(const Tensor& dz, const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                      const Tensor& rstd, const Tensor& mean_dy, const Tensor& mean_dy_xhat, bool silu) {
  const Call<1> call("bn_silu_backward_apply", {{{x, weight, bias}}});
  return input_gradient_call<1>(call, dz, {mean}, {rstd}, {mean_dy, mean_dy_xhat}, silu)[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("bn_silu_forward", TORCH_BOX(&forward));
  library.impl("bn_silu_backward", TORCH_BOX(&backward));
  library.impl("bn_stats", TORCH_BOX(&stats));
  library.impl("bn_silu_apply", TORCH_BOX(&apply_given));
  library.impl("bn_silu_backward_sums", TORCH_BOX(&backward_sums));
  library.impl("bn_silu_backward_apply", TORCH_BOX(&backward_apply));
}
