// Marks functions that the host's and the GPU's kernels share. YF_CUDA: the code of a GPU's kernels is compiled, by nvcc or
// by the host's compiler with cuda_on_host/cuda_runtime.h.
#pragma once

#if defined(__CUDACC__) || defined(YF_CUDA_ON_HOST)
#define YF_CUDA
#define YF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define YF_HOST_DEVICE inline
#endif
