// Tensors on the fake CUDA device (device.cpp) with memory of the host, as a Python module: the operators of PyTorch
// compute on the CPU; convolutions, copies of maps and weights, and in-place operators of lists of tensors do nothing.
// What is left of a step is the host's part of it: Python, dispatcher, autograd, allocation, and Triton's launches.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::jit::Stack;

const c10::impl::DeviceGuardImplInterface& guard() { return *c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    // As the caching allocator aligns.
    void* data = bytes ? std::aligned_alloc(512, (bytes + 511) / 512 * 512) : nullptr;
    return {data, data, &std::free, guard().getDevice()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Memory memory;

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard on(device);
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard on(device);
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

void release(void* storage) { delete static_cast<c10::Storage*>(storage); }

// The same memory as a tensor of another device; it keeps the memory alive.
at::Tensor alias(const at::Tensor& tensor, c10::Device device) {
  const c10::DataPtr& own = tensor.storage().data_ptr();
  c10::Storage storage;
  if (own.get_deleter() == &release) {
    storage = *static_cast<c10::Storage*>(own.get_context());  // back to where it came from
  } else {
    storage = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                           c10::DataPtr(own.get(), new c10::Storage(tensor.storage()), &release, device));
  }
  const auto key = device.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU;
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// Any operator: the CPU's kernel on the same memory. What it writes in place comes back as the tensors that were given.
void on_host(const c10::OperatorHandle& op, Stack* stack) {
  const size_t arguments = op.schema().arguments().size();
  const size_t first = stack->size() - arguments;
  c10::Device device = guard().getDevice();
  c10::SmallVector<std::pair<at::Tensor, at::Tensor>, 8> given;  // on the host, on the device
  const auto lowered = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    device = tensor.device();
    // An operator may resize an output without memory.
    const bool unallocated = tensor.storage().nbytes() == 0;
    given.emplace_back(unallocated ? at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)) : alias(tensor, c10::kCPU),
                       tensor);
    return given.back().first;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = lowered(value.toTensor());
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      if (value.isTensorList()) {
        std::vector<at::Tensor> list = value.toTensorVector();
        for (at::Tensor& one : list) one = lowered(one);
        value = list;
      } else {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor>& one : value.toOptionalTensorList())
          list.push_back(one ? std::optional(lowered(*one)) : std::nullopt);
        value = list;
      }
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      device = value.toDevice();
      value = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (const auto& [host, own] : given) {
    if (host.sizes() == own.sizes()) continue;
    const at::Tensor resized = alias(host, device);
    own.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
    own.unsafeGetTensorImpl()->set_sizes_and_strides(resized.sizes(), resized.strides());
  }
  const auto raised = [&](const at::Tensor& tensor) {
    for (const auto& [host, own] : given)
      if (host.is_same(tensor)) return own;
    return tensor.defined() && tensor.is_cpu() ? alias(tensor, device) : tensor;
  };
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = raised(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list = value.toTensorVector();
      for (at::Tensor& one : list) one = raised(one);
      value = list;
    }
  }
}

// In-place operators of lists: in C++ some launches for thousands of tensors.
void nothing(const c10::OperatorHandle& op, Stack* stack) { torch::jit::drop(*stack, op.schema().arguments().size()); }

std::vector<at::Tensor> norms(at::TensorList tensors, const at::Scalar&, std::optional<at::ScalarType>) {
  const at::Tensor all = at::zeros({static_cast<int64_t>(tensors.size())}, tensors[0].options());
  return all.unbind();
}

at::Tensor like(c10::IntArrayRef size, const at::Tensor& other) {
  return at::empty(size, other.options().memory_format(other.suggest_memory_format()));
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>&,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool,
                       c10::IntArrayRef, int64_t) {
  return like(at::native::conv_output_size(x.sizes(), weight.sizes(), padding, stride, dilation), x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, at::OptionalIntArrayRef, c10::IntArrayRef,
    c10::IntArrayRef, c10::IntArrayRef, bool, c10::IntArrayRef, int64_t, std::array<bool, 3> wanted) {
  return {wanted[0] ? like(x.sizes(), x) : at::Tensor(), wanted[1] ? like(weight.sizes(), weight) : at::Tensor(),
          wanted[2] ? at::empty({weight.size(0)}, dy.options()) : at::Tensor()};
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  c10::TensorImpl& own = *self.unsafeGetTensorImpl();
  own.set_storage_keep_dtype(std::move(source));
  if (stride.empty()) {
    own.set_sizes_contiguous(size);
    own.set_storage_offset(offset);
  } else {
    own.set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

// Copies of maps and weights are the device's work. Others, such as of targets, have values that are used as indices.
at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (self.is_cuda() && from.is_cuda() && self.dim() == 4 && self.is_floating_point()) return self;
  const auto host = [](const at::Tensor& tensor) { return tensor.is_cuda() ? alias(tensor, c10::kCPU) : tensor; };
  host(self).copy_(host(from), non_blocking);
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, c10::Storage)>(&at::native::set_));
  m.impl("convolution", TORCH_FN(convolution));
  m.impl("convolution_backward", TORCH_FN(convolution_backward));
  m.impl("_foreach_norm.Scalar", TORCH_FN(norms));
  m.impl("copy_", TORCH_FN(copy));
}

PyObject* exchange_device(PyObject*, PyObject* index) {
  const long wanted = PyLong_AsLong(index);
  const c10::DeviceIndex before = guard().getDevice().index();
  if (wanted >= 0) guard().setDevice({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(wanted)});
  return PyLong_FromLong(before);
}

PyObject* current_device(PyObject*, PyObject*) { return PyLong_FromLong(guard().getDevice().index()); }

int device_index() { return guard().getDevice().index(); }

// For operators with a kernel for all devices, which the fallback does not replace.
PyObject* implement(PyObject*, PyObject* arguments) {
  const char *space = nullptr, *name = nullptr;
  int runs = 0;
  if (!PyArg_ParseTuple(arguments, "ssp", &space, &name, &runs)) return nullptr;
  static std::vector<std::unique_ptr<torch::Library>> libraries;
  libraries.push_back(
      std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::CUDA, __FILE__, __LINE__));
  libraries.back()->impl(name, runs ? torch::CppFunction::makeFromBoxedFunction<&on_host>()
                                    : torch::CppFunction::makeFromBoxedFunction<&nothing>());
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"exchange_device", exchange_device, METH_O, "Make device `index` current; returns the one before."},
    {"current_device", current_device, METH_NOARGS, "Index of the current device."},
    {"implement", implement, METH_VARARGS, "implement(namespace, name, runs): on the host, or not at all."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "host_memory", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_host_memory() {
  c10::SetAllocator(c10::DeviceType::CUDA, &memory);
  PyObject* made = PyModule_Create(&module);
  PyModule_AddObject(made, "device_index", PyLong_FromVoidPtr(reinterpret_cast<void*>(&device_index)));
  return made;
}
