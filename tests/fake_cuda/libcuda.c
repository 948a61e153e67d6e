// A CUDA driver library that launches nothing, for Triton's own driver: what it is asked to launch is counted and noted.
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MOST 65536

struct launch {
  char kernel[64];
  int device, grid[3], threads, shared;
  unsigned long long stream;
};

struct function {
  char name[64];
};

static struct launch noted[MOST];
static atomic_int launches, modules;
static int capability = 90;
static __thread intptr_t context;  // 1 + the device's index; 0: none is current
static int (*device_of_torch)(void);

// ---- for the tests

void fake_set_capability(int value) { capability = value; }
void fake_set_device(int (*function)(void)) { device_of_torch = function; }
int fake_launches(void) { return launches; }
int fake_modules(void) { return modules; }
const struct launch* fake_launch(int index) { return &noted[index % MOST]; }
void fake_reset(void) { launches = modules = 0; }

// ---- of the CUDA driver library

CUresult cuDriverGetVersion(int* version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "an error of the fake driver", CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = capability == 80 ? 163 << 10 : 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = capability == 80 ? 164 << 10 : 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

// The runtime of torch, which makes a device's context current, is not there: the current device's is.
CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = (CUcontext)(device_of_torch ? device_of_torch() + 1 : context);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext wanted) { return context = (intptr_t)wanted, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) { return *made = (CUcontext)(intptr_t)(device + 1), CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  ++modules;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* made, CUmodule module, const char* name) {
  struct function* function = calloc(1, sizeof *function);
  strncpy(function->name, name, sizeof function->name - 1);
  *made = (CUfunction)function;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  struct launch* own = &noted[launches++ % MOST];
  CUcontext current;
  cuCtxGetCurrent(&current);
  memcpy(own->kernel, ((struct function*)function)->name, sizeof own->kernel);
  own->device = (int)(intptr_t)current - 1;
  own->grid[0] = config->gridDimX, own->grid[1] = config->gridDimY, own->grid[2] = config->gridDimZ;
  own->threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  own->shared = config->sharedMemBytes;
  own->stream = (unsigned long long)config->hStream;
  return CUDA_SUCCESS;
}
