// The caller's CUDA stream and error checks, without linking libtorch_cuda.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// These live in libtorch_cuda. Declared as the shim does, but weak: the library then loads beside a CPU torch too.
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

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace yolov9_fast
