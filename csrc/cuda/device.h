// The GPUs of this machine, as the CUDA runtime, linked statically, finds them, and which of them compiled kernels run
// on: the latter is decided from names and numbers, without a GPU.
#pragma once

#include <cstdlib>
#include <sstream>
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

// "sm_80,compute_80" as its names.
inline std::vector<std::string> split_architectures(const std::string& list) {
  std::vector<std::string> names;
  std::istringstream rest(list);
  for (std::string name; std::getline(rest, name, ',');) names.push_back(name);
  return names;
}

// Is there code for a GPU of this compute capability? "sm_XY" is machine code: for XY, and later ones of the same X.
// "compute_XY" is PTX, which a driver no older than the compiler makes into machine code: for XY and all later ones.
// With an "a" behind it, code is for exactly XY; with an "f" for XY and later ones of the same X. Versions are as CUDA
// has them, 12040 for 12.4. Returns "" or why not, as a clause, and what to do.
inline std::string no_code_for(const std::vector<std::string>& architectures, int major, int minor, int driver,
                               int runtime) {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + '.' + std::to_string(number % 1000 / 10);
  };
  const std::string capability = std::to_string(major) + std::to_string(minor);
  std::string all;
  bool old_driver = false;
  for (const std::string& name : architectures) {
    all += (all.empty() ? "" : ", ") + name;
    const size_t digits = name.find('_') + 1;
    const bool ptx = name.compare(0, digits, "compute_") == 0;
    const int number = std::atoi(name.c_str() + digits), its_major = number / 10, its_minor = number % 10;
    const char kind = name.back();
    const bool same_major = its_major == major && its_minor <= minor;
    const bool fits = kind == 'a'           ? number == 10 * major + minor
                      : kind == 'f' || !ptx ? same_major
                                            : number <= 10 * major + minor;
    if (fits && (!ptx || driver >= runtime)) return "";
    old_driver = old_driver || fits;
  }
  if (old_driver) {
    return "its driver, of CUDA " + version(driver) + ", cannot compile what CUDA " + version(runtime) +
           " made for it: update the driver, or build hfac again with HFAC_CUDA_ARCHS=" + capability;
  }
  return "it is of compute capability " + std::to_string(major) + '.' + std::to_string(minor) +
         ", and the kernels were compiled for " + all + ": build hfac again with HFAC_CUDA_ARCHS=" + capability;
}

}  // namespace hfac
