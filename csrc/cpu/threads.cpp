// The pool of threads.
#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace hfac {
namespace {

class Pool {
 public:
  const pid_t owner = getpid();
  std::mutex busy;  // held by the one call that uses the pool

  void run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads - 1 && start_worker()) ++workers_;
    body_ = &body;
    wanted_ = running_ = std::min(threads - 1, workers_);
    std::fegetenv(&environment_);
    error_ = nullptr;
    ++generation_;
    lock.unlock();
    start_.notify_all();
    guarded(body, 0);
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    body_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // False where the system has no thread left, as in a container with a limit: those that are there do the work.
  bool start_worker() {
    try {
      std::thread(&Pool::work, this, workers_ + 1, generation_).detach();
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  void work(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
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
  unsigned long generation_ = 0;
  int workers_ = 0, wanted_ = 0, running_ = 0;
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

void parallel(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) return body(0);
  Pool* const shared = pool();
  if (!shared) return body(0);
  std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
  if (!mine.owns_lock()) return body(0);
  shared->run(threads, body);
}

}  // namespace hfac
