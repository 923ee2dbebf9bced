// How a tensor is read where it lies, without linking torch: two functions of its stable C interface
// (torch/csrc/inductor/aoti_torch/c/shim.h), found at run time, and the places where a tensor keeps what describes it,
// which `hfac.backends.snapshots` finds in the torch that is loaded, and checks.
#pragma once

#include <Python.h>

#include <cstdint>

namespace hfac {
namespace torch_abi {

struct Tensor;  // at::Tensor: one word, the address of its implementation
using Handle = Tensor*;

// Each returns 0, or another number where torch has thrown, which it then reports on stderr.
struct Functions {
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*data_ptr)(Handle, void**);  // of the first element
};

// In words of 8 bytes. The sizes follow their number; behind a tensor's sizes and strides is room for those of others.
struct Places {
  uint32_t handle;                                        // in a Python tensor
  uint32_t storage, sizes, strides, offset, types, keys;  // in its implementation
  uint32_t data, deleter;                                 // in its storage: where it begins, and who frees it

  // Dimensions of tensors that keep their sizes in themselves.
  uint32_t room() const { return strides - sizes - 1; }
};

inline Handle handle_of(PyObject* tensor, uint32_t place) {
  return reinterpret_cast<Handle>(reinterpret_cast<uint64_t*>(tensor) + place);
}
// Of the word at `types`: the element type, and the device's type and index. Other bits may be anything.
constexpr uint64_t kTypeBits = (uint64_t{1} << 40) - 1;

// What the word at a place is the address of.
inline const uint64_t* at(const void* words, uint32_t place) {
  return static_cast<const uint64_t* const*>(words)[place];
}

}  // namespace torch_abi
}  // namespace hfac
