// rep_bn_silu on the CPU: out = act(BN1(x1) + BN2(x2)) (+ residual) and its gradient; the loops are in batch_norm.h.
#include "cpu/batch_norm_call.h"

#include <tuple>

namespace {

using namespace yolov9_fast;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1,
                                                   OptionalTensor running_mean1, OptionalTensor running_var1,
                                                   const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                                                   OptionalTensor running_mean2, OptionalTensor running_var2,
                                                   double momentum, double eps, OptionalTensor residual, Tensor out,
                                                   bool silu) {
  const Call<2> call("rep_bn_silu_forward", {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  std::array<Tensor, 2> mean, rstd;
  const std::array<std::array<OptionalTensor, 2>, 2> running{{{running_mean1, running_var1}, {running_mean2, running_var2}}};
  forward_call<2>(call, running, momentum, eps, residual, out, silu, mean, rstd);
  return {mean[0], rstd[0], mean[1], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dz, const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1, const Tensor& mean1,
    const Tensor& rstd1, const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2, const Tensor& mean2,
    const Tensor& rstd2, bool silu) {
  const Call<2> call("rep_bn_silu_backward", {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  const Gradients<2> gradients = backward_call<2>(call, dz, {mean1, mean2}, {rstd1, rstd2}, silu);
  return {gradients.dx[0], gradients.dx[1], gradients.dweight[0], gradients.dbias, gradients.dweight[1],
          torch::stable::clone(gradients.dbias)};
}

void apply_given(const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1, const Tensor& mean1,
                 const Tensor& rstd1, const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                 const Tensor& mean2, const Tensor& rstd2, OptionalTensor residual, Tensor out, bool silu) {
  const Call<2> call("rep_bn_silu_apply", {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  apply_call<2>(call, {mean1, mean2}, {rstd1, rstd2}, residual, out, silu);
}

Tensor backward_sums(const Tensor& dz, const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1,
                     const Tensor& mean1, const Tensor& rstd1, const Tensor& x2, OptionalTensor weight2,
                     OptionalTensor bias2, const Tensor& mean2, const Tensor& rstd2, bool silu) {
  const Call<2> call("rep_bn_silu_backward_sums", {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  return sums_call<2>(call, dz, {mean1, mean2}, {rstd1, rstd2}, silu);
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dz, const Tensor& x1, OptionalTensor weight1,
                                          OptionalTensor bias1, const Tensor& mean1, const Tensor& rstd1,
                                          const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                                          const Tensor& mean2, const Tensor& rstd2, const Tensor& mean_dy,
                                          const Tensor& mean_dy_xhat1, const Tensor& mean_dy_xhat2, bool silu) {
  const Call<2> call("rep_bn_silu_backward_apply", {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  const auto dx = input_gradient_call<2>(call, dz, {mean1, mean2}, {rstd1, rstd2},
                                         {mean_dy, mean_dy_xhat1, mean_dy_xhat2}, silu);
  return {dx[0], dx[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("rep_bn_silu_forward", TORCH_BOX(&forward));
  library.impl("rep_bn_silu_backward", TORCH_BOX(&backward));
  library.impl("rep_bn_silu_apply", TORCH_BOX(&apply_given));
  library.impl("rep_bn_silu_backward_sums", TORCH_BOX(&backward_sums));
  library.impl("rep_bn_silu_backward_apply", TORCH_BOX(&backward_apply));
}
