// The part of DLPack 1.x (github.com/dmlc/dlpack, include/dlpack/dlpack.h) with which a tensor is read where it lies:
// torch.Tensor.__dlpack_c_exchange_api__ is a capsule of ExchangeApi. Its layout is stable, so no torch is linked.
#pragma once

#include <cstdint>

namespace hfac {
namespace dlpack {

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;  // the tensor's own: valid until control is returned
  uint64_t byte_offset;
};

struct Header {
  uint32_t major, minor;
  Header* earlier;
};

struct ExchangeApi {
  Header header;
  void *allocate, *from_object, *to_object;
  int (*read)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; may be null
  void* stream;
};

constexpr char kCapsule[] = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

}  // namespace dlpack
}  // namespace hfac
