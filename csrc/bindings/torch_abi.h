// The part of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h) with which a tensor is read where it
// lies. Its functions are found at run time, so that nothing of torch is linked; they take a handle, which is the
// address of an at::Tensor. A Python tensor holds one, at a place that `hfac.backends.snapshots` finds and checks.
#pragma once

#include <Python.h>

#include <cstdint>

namespace hfac {
namespace torch_abi {

struct Tensor;  // at::Tensor
using Handle = Tensor*;

// Each returns 0, or another number where torch has thrown, which it then reports on stderr.
struct Functions {
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*device_type)(Handle, int32_t*);
  int32_t (*device_index)(Handle, int32_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);    // the tensor's own: valid until control is returned
  int32_t (*strides)(Handle, int64_t**);  // likewise
  int32_t (*data_ptr)(Handle, void**);    // of the first element
};

inline Handle handle_of(PyObject* tensor, Py_ssize_t offset) {
  return reinterpret_cast<Handle>(reinterpret_cast<char*>(tensor) + offset);
}

}  // namespace torch_abi
}  // namespace hfac
