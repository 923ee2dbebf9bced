#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

namespace hfac {
namespace {

long process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

class Pool {
 public:
  const long owner = process_id();
  std::mutex busy;  // held by the one call that uses the pool

  void run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads - 1) {
      std::thread(&Pool::work, this, ++workers_, generation_).detach();
    }
    body_ = &body;
    wanted_ = running_ = threads - 1;
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
  void work(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index > wanted_) continue;
      const std::function<void(int)>& body = *body_;
      lock.unlock();
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
  unsigned long generation_ = 0;
  int workers_ = 0, wanted_ = 0, running_ = 0;
};

// A fork copies the pool but none of its threads, and perhaps a locked mutex: the child makes a new one and leaves the
// old one alone. A pool is never destroyed, for its threads wait in it until the process ends.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (!found || found->owner != process_id()) {
    auto fresh = std::make_unique<Pool>();
    if (current.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) found = fresh.release();
  }
  return *found;
}

}  // namespace

void parallel(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) return body(0);
  Pool& shared = pool();
  std::unique_lock<std::mutex> mine(shared.busy, std::try_to_lock);
  if (!mine.owns_lock()) return body(0);
  shared.run(threads, body);
}

}  // namespace hfac
