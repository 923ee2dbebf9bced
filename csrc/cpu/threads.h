// The threads of a call: torch's own (team.h), or where those cannot be had a small pool. A thread of the pool that
// has done its part stays awake for 100 microseconds, so that the next of several calls in a step finds it, and then
// sleeps.
#pragma once

#include <functional>

namespace hfac {

// What a thread that waits in a loop does in each round.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether a call of `parallel` now would find a thread that need not be woken.
bool threads_are_awake();

// Calls body(0) ... body(threads - 1), each once and on a thread of its own, body(0) on the caller's. Returns when all
// have returned. Where the system refuses threads, fewer bodies run, and while another call holds the pool, body(0)
// only: bodies share their work through a counter and must get all of it done however many of them run. All of them
// compute in the caller's floating-point environment. An exception of a body is rethrown here; nothing else throws.
void parallel(int threads, const std::function<void(int)>& body);

}  // namespace hfac
