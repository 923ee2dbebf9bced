// What the CUDA runtime, linked statically, finds on this machine.
#pragma once

#include <string>
#include <vector>

namespace hfac {

struct CudaDevice {
  std::string name;
  int major, minor;
  std::string why_not;  // empty where there are kernels for it
};

struct CudaInfo {
  std::vector<CudaDevice> devices;         // by the runtime's index
  std::vector<std::string> architectures;  // that were compiled for, as nvcc calls them
  int driver_version, runtime_version;     // 12040 is 12.4; 0: no driver
  std::string why_not;                     // empty where there is a device
};

// Makes no context on any device.
CudaInfo cuda_info();

}  // namespace hfac
