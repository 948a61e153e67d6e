// Floating element types: what each is computed in, and the call of a generic function for a tensor's dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace yolov9_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 is computed in float64, every other type in float32.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Real>
constexpr ScalarType kScalarType = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

// Calls body(T{}) for the element type of `type`, the dtype of the argument `name`.
template <class Body>
void dispatch(ScalarType type, const char* op, const char* name, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, op, ": ", name, ": expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace yolov9_fast
