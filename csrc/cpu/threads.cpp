// The pool of threads.
#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "team.h"

namespace hfac {
namespace {

// To wake a thread that sleeps takes some ten microseconds, on a virtual machine more than fifty.
constexpr std::chrono::microseconds kAwake{100};

// Until `ready` or for as long as a thread stays awake for it.
template <class Ready>
void linger(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  do {
    for (int k = 0; k < 32; ++k) {
      if (ready()) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
}

class Pool {
 public:
  const pid_t owner = getpid();
  std::mutex busy;            // held by the one call that uses the pool
  std::atomic<int> awake{0};  // workers that have no work and do not sleep yet

  void run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads - 1 && start_worker()) ++workers_;
    body_ = &body;
    running_ = wanted_ = std::min(threads - 1, workers_);
    std::fegetenv(&environment_);
    error_ = nullptr;
    ++generation_;
    lock.unlock();
    start_.notify_all();
    guarded(body, 0);
    linger([this] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    body_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // False where the system has no thread left, as in a container with a limit: those that are there do the work.
  bool start_worker() {
    try {
      std::thread(&Pool::work, this, workers_ + 1, generation_.load()).detach();
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  void work(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (generation_ == seen) {
        lock.unlock();
        ++awake;
        linger([&] { return generation_ != seen; });
        --awake;
        lock.lock();
      }
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index > wanted_) continue;
      const std::function<void(int)>& body = *body_;
      const std::fenv_t environment = environment_;
      lock.unlock();
      std::fesetenv(&environment);
      guarded(body, index);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void guarded(const std::function<void(int)>& body, int index) {
    try {
      body(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex mutex_, error_mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr error_;
  std::fenv_t environment_;  // the caller's: how to round, and whether what is denormal is zero
  // These two are written under the mutex and read without it by who lingers.
  std::atomic<unsigned long> generation_{0};
  std::atomic<int> running_{0};
  int workers_ = 0, wanted_ = 0;
};

// A fork copies the pool but none of its threads, and perhaps a locked mutex: the child makes a new one and leaves the
// old one alone. A pool is never destroyed, for its threads wait in it until the process ends. Null where there is no
// memory for one.
Pool* pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (!found || found->owner != getpid()) {
    Pool* const fresh = new (std::nothrow) Pool;
    if (!fresh) return nullptr;
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) {
      found = fresh;
    } else {
      delete fresh;
    }
  }
  return found;
}

}  // namespace

bool threads_are_awake() {
  if (team_is_awake()) return true;
  Pool* const shared = pool();
  return shared && shared->awake > 0;
}

void parallel(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) return body(0);
  Pool* const shared = pool();
  if (!shared) return body(0);
  std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
  if (!mine.owns_lock()) return body(0);
  if (!team(threads, body)) shared->run(threads, body);
}

}  // namespace hfac
