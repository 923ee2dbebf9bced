// Asynchronous copies from global to shared memory, which take no registers while they are under way.
#pragma once

#include <type_traits>

#include "element.cuh"

namespace hfac {

// 16 bytes to shared memory, while the thread goes on; zeros, and nothing is read, unless they are `there`.
HFAC_DEVICE void begin_copy(Chunk* to, const char* from, bool there) {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
#else
  emulation::begin_copy(to, from, sizeof(Chunk), there ? sizeof(Chunk) : 0);
#endif
}
HFAC_DEVICE void begin_copy(Chunk* to, const char* from, std::true_type) {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  emulation::begin_copy(to, from, sizeof(Chunk), sizeof(Chunk));
#endif
}
HFAC_DEVICE void commit_copies() {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}
// Until no more than kLeft of the groups that the thread has committed are under way.
template <int kLeft>
HFAC_DEVICE void wait_for_copies() {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulation::wait_for_copies(kLeft);
#endif
}

}  // namespace hfac
