// The current CUDA stream and the checks of devices and launches, without linking libtorch_cuda.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

// Defined in libtorch_cuda. Declared as in the shim, but weak, so that the library also loads with a torch for CPUs.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#pragma weak aoti_torch_get_current_cuda_stream

namespace yolov9_fast {

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  STD_TORCH_CHECK(error == 0, "no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_device(const torch::stable::Tensor& tensor, int32_t device, const char* op, const char* name) {
  const int32_t found = tensor.is_cuda() ? tensor.get_device_index() : -1;
  STD_TORCH_CHECK(found == device, op, ": ", name, ": expected a tensor on CUDA device ", device, ", got one on ",
                  found < 0 ? "the CPU" : "CUDA device " + std::to_string(found));
}

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace yolov9_fast
