#include <cuda_runtime.h>

#include "device.h"

namespace hfac {

CudaInfo cuda_info() {
  CudaInfo info{};
  cudaDriverGetVersion(&info.driver_version);
  cudaRuntimeGetVersion(&info.runtime_version);
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess) {
    info.why_not = cudaGetErrorString(found);
    cudaGetLastError();  // the error is told, not left for the next caller
    return info;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    info.devices.push_back({properties.name, properties.major, properties.minor});
  }
  if (info.devices.empty()) info.why_not = "no CUDA device";
  return info;
}

}  // namespace hfac
