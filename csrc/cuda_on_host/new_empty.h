// Included before each translated file: new tensors are filled with 0xFF (NaN, -1), so that a kernel which leaves a number
// unwritten gives a wrong result.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable {

template <class... Rest>
Tensor poisoned_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, Rest... rest) {
  Tensor made = new_empty(like, size, rest...);
  const size_t bytes = static_cast<size_t>(made.numel()) * made.element_size();
  if (bytes > 0) std::memset(made.mutable_data_ptr(), 0xFF, bytes);
  return made;
}

}  // namespace torch::stable

#define new_empty poisoned_new_empty
