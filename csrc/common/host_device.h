// Marks functions that the host's and the GPU's kernels share.
#pragma once

#ifdef __CUDACC__
#define YF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define YF_HOST_DEVICE inline
#endif
