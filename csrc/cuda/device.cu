// What the CUDA runtime finds on this machine.
#include <cuda_runtime.h>

#include "device.h"

#ifndef HFAC_ARCHITECTURES
#error "HFAC_ARCHITECTURES names what is compiled for, as in \"sm_90,compute_90\" (setup.py)"
#endif

namespace hfac {

CudaInfo cuda_info() {
  CudaInfo info{};
  info.architectures = split_architectures(HFAC_ARCHITECTURES);
  cudaDriverGetVersion(&info.driver_version);
  cudaRuntimeGetVersion(&info.runtime_version);
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess) info.why_not = cudaGetErrorString(found);
  for (int device = 0; found == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    const cudaError_t status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) {
      info.devices.push_back({"?", 0, 0, cudaGetErrorString(status)});
      continue;
    }
    info.devices.push_back({properties.name, properties.major, properties.minor,
                            no_code_for(info.architectures, properties.major, properties.minor, info.driver_version,
                                        info.runtime_version)});
  }
  if (info.why_not.empty() && info.devices.empty()) info.why_not = "no CUDA device";
  cudaGetLastError();  // errors are reported, not left for the next caller
  return info;
}

}  // namespace hfac
