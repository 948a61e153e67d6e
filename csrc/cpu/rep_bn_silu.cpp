// rep_bn_silu on the CPU: out = act(BN1(x1) + BN2(x2)) (+ residual) and its gradient; the loops are in batch_norm.h.
#include <tuple>

#include "cpu/batch_norm_call.h"

namespace {

using namespace yolov9_fast;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1,
                                                   OptionalTensor running_mean1, OptionalTensor running_var1,
                                                   const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                                                   OptionalTensor running_mean2, OptionalTensor running_var2,
                                                   double momentum, double eps, OptionalTensor residual, Tensor out,
                                                   bool silu) {
  Call<2> call("rep_bn_silu_forward", silu, {{{x1, weight1, bias1}, {x2, weight2, bias2}}});
  call.forward({{{running_mean1, running_var1}, {running_mean2, running_var2}}}, momentum, eps, residual, out);
  const auto& [one, two] = call.branches;
  return {one.mean, one.rstd, two.mean, two.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dz, const Tensor& x1,
                                                                    OptionalTensor weight1, OptionalTensor bias1,
                                                                    const Tensor& mean1, const Tensor& rstd1,
                                                                    const Tensor& x2, OptionalTensor weight2,
                                                                    OptionalTensor bias2, const Tensor& mean2,
                                                                    const Tensor& rstd2, bool silu) {
  const Call<2> call("rep_bn_silu_backward", silu,
                     {{{x1, weight1, bias1, mean1, rstd1}, {x2, weight2, bias2, mean2, rstd2}}});
  const Gradients<2> gradients = call.backward(dz);
  return {gradients.dx[0], gradients.dx[1],      gradients.dweight[0],
          gradients.dbias, gradients.dweight[1], torch::stable::clone(gradients.dbias)};
}

void apply_statistics(const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1, const Tensor& mean1,
                      const Tensor& rstd1, const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                      const Tensor& mean2, const Tensor& rstd2, OptionalTensor residual, Tensor out, bool silu) {
  Call<2>("rep_bn_silu_apply", silu, {{{x1, weight1, bias1, mean1, rstd1}, {x2, weight2, bias2, mean2, rstd2}}})
      .apply(residual, out);
}

Tensor backward_sums(const Tensor& dz, const Tensor& x1, OptionalTensor weight1, OptionalTensor bias1,
                     const Tensor& mean1, const Tensor& rstd1, const Tensor& x2, OptionalTensor weight2,
                     OptionalTensor bias2, const Tensor& mean2, const Tensor& rstd2, bool silu) {
  const Call<2> call("rep_bn_silu_backward_sums", silu,
                     {{{x1, weight1, bias1, mean1, rstd1}, {x2, weight2, bias2, mean2, rstd2}}});
  return call.sums(dz);
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dz, const Tensor& x1, OptionalTensor weight1,
                                          OptionalTensor bias1, const Tensor& mean1, const Tensor& rstd1,
                                          const Tensor& x2, OptionalTensor weight2, OptionalTensor bias2,
                                          const Tensor& mean2, const Tensor& rstd2, const Tensor& mean_dy,
                                          const Tensor& mean_dy_xhat1, const Tensor& mean_dy_xhat2, bool silu) {
  const Call<2> call("rep_bn_silu_backward_apply", silu,
                     {{{x1, weight1, bias1, mean1, rstd1}, {x2, weight2, bias2, mean2, rstd2}}});
  const auto dx = call.input_gradient(dz, {mean_dy, mean_dy_xhat1, mean_dy_xhat2});
  return {dx[0], dx[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("rep_bn_silu_forward", TORCH_BOX(&forward));
  library.impl("rep_bn_silu_backward", TORCH_BOX(&backward));
  library.impl("rep_bn_silu_apply", TORCH_BOX(&apply_statistics));
  library.impl("rep_bn_silu_backward_sums", TORCH_BOX(&backward_sums));
  library.impl("rep_bn_silu_backward_apply", TORCH_BOX(&backward_apply));
}
