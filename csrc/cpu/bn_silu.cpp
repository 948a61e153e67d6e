// bn_silu on the CPU: out = act(BN(x)) (+ residual) and its gradient; the loops are in batch_norm.h.
#include <tuple>

#include "cpu/batch_norm_call.h"

namespace {

using namespace yolov9_fast;

std::tuple<Tensor, Tensor> forward(const Tensor& x, OptionalTensor weight, OptionalTensor bias,
                                   OptionalTensor running_mean, OptionalTensor running_var, double momentum, double eps,
                                   OptionalTensor residual, Tensor out, bool silu) {
  Call<1> call("bn_silu_forward", silu, {{{x, weight, bias}}});
  call.forward({{{running_mean, running_var}}}, momentum, eps, residual, out);
  return {call.branches[0].mean, call.branches[0].rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dz, const Tensor& x, OptionalTensor weight,
                                            OptionalTensor bias, const Tensor& mean, const Tensor& rstd, bool silu) {
  const Gradients<1> gradients = Call<1>("bn_silu_backward", silu, {{{x, weight, bias, mean, rstd}}}).backward(dz);
  return {gradients.dx[0], gradients.dweight[0], gradients.dbias};
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  const Call<1> call("bn_stats", false, {{{x}}});
  Tensor mean = call.per_channel(), m2 = call.per_channel();
  call.statistics(0, [&]<typename T>(const Statistics<T>& found) {
    using A = Compute<T>;
    std::copy_n(found.mean.data(), found.channels, vector_of<A>(mean, found.channels, "mean"));
    std::copy_n(found.m2.data(), found.channels, vector_of<A>(m2, found.channels, "m2"));
  });
  return {mean, m2};
}

void apply_statistics(const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                      const Tensor& rstd, OptionalTensor residual, Tensor out, bool silu) {
  Call<1>("bn_silu_apply", silu, {{{x, weight, bias, mean, rstd}}}).apply(residual, out);
}

Tensor backward_sums(const Tensor& dz, const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                     const Tensor& rstd, bool silu) {
  return Call<1>("bn_silu_backward_sums", silu, {{{x, weight, bias, mean, rstd}}}).sums(dz);
}

Tensor backward_apply(const Tensor& dz, const Tensor& x, OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                      const Tensor& rstd, const Tensor& mean_dy, const Tensor& mean_dy_xhat, bool silu) {
  const Call<1> call("bn_silu_backward_apply", silu, {{{x, weight, bias, mean, rstd}}});
  return call.input_gradient(dz, {mean_dy, mean_dy_xhat})[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("bn_silu_forward", TORCH_BOX(&forward));
  library.impl("bn_silu_backward", TORCH_BOX(&backward));
  library.impl("bn_stats", TORCH_BOX(&stats));
  library.impl("bn_silu_apply", TORCH_BOX(&apply_statistics));
  library.impl("bn_silu_backward_sums", TORCH_BOX(&backward_sums));
  library.impl("bn_silu_backward_apply", TORCH_BOX(&backward_apply));
}
