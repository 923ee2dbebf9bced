// What the CUDA runtime, linked statically, finds on this machine.
#pragma once

#include <string>
#include <vector>

namespace hfac {

struct CudaDevice {
  std::string name;
  int major, minor;
};

struct CudaInfo {
  std::vector<CudaDevice> devices;
  int driver_version, runtime_version;  // 12040 is 12.4; 0: no driver
  std::string why_not;                  // empty where a device can be used
};

CudaInfo cuda_info();

}  // namespace hfac
