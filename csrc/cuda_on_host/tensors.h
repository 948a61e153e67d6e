// Included before each translated file: new tensors are filled with 0xFF (NaN, -1), so that a kernel which leaves a number
// unwritten gives a wrong result, and their memory is the device's.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable {

inline Tensor on_device(const Tensor& made, bool poison) {
  const size_t bytes = static_cast<size_t>(made.numel()) * made.element_size();
  if (poison && bytes > 0 && cuda_on_host::poisoned()) std::memset(made.mutable_data_ptr(), 0xFF, bytes);
  cuda_on_host::device_of(made);
  cuda_on_host::keep(std::make_shared<Tensor>(made));
  return made;
}

template <class... Rest>
Tensor device_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, Rest... rest) {
  return on_device(new_empty(like, size, rest...), true);
}
template <class... Rest>
Tensor device_new_zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, Rest... rest) {
  return on_device(new_zeros(like, size, rest...), false);
}
inline Tensor device_empty_like(const Tensor& like) { return on_device(empty_like(like), true); }
// As torch::stable::empty with all arguments given, which are optional there: this one is the better match.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size, torch::headeronly::ScalarType type,
                    torch::headeronly::Layout layout, Device device, bool pinned,
                    torch::headeronly::MemoryFormat format) {
  return on_device(empty(size, std::optional(type), std::optional(layout), std::optional(device),
                         std::optional(pinned), std::optional(format)),
                   true);
}
inline Tensor device_contiguous(const Tensor& tensor) {
  const Tensor made = contiguous(tensor);
  return made.const_data_ptr() == tensor.const_data_ptr() ? made : on_device(made, false);
}

}  // namespace torch::stable

#define new_empty device_new_empty
#define new_zeros device_new_zeros
#define empty_like device_empty_like
#define contiguous device_contiguous
