// The threads that torch itself computes with. A backward pass leaves them awake: OpenMP's wait for their next work in
// a loop, for some milliseconds, and threads of our own would have to share the cores with them meanwhile.
#pragma once

#include <functional>

namespace hfac {

// As `parallel` (threads.h), on torch's threads. False, and nothing has run, where they cannot be had: torch is not
// loaded or has fewer, its threads are not OpenMP's, or this process was forked, in which OpenMP has lost them.
bool team(int threads, const std::function<void(int)>& body);

// Whether the team has been at work so lately that its threads need not be woken.
bool team_is_awake();

}  // namespace hfac
