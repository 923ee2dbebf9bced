#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <new>
#include <stdexcept>

#include "threads.h"

namespace hfac {
namespace {

constexpr std::align_val_t kLine{64};

// Items of up to this many elements are done whole, several in one task: a task should outweigh its bookkeeping.
constexpr int64_t kSmall = 32768;
constexpr int64_t kBatch = 16384;

// Elements that are worth waking another thread for (some ten microseconds).
constexpr int64_t kPerThread = 16384;

struct Task {
  int64_t first, last;  // items [first, last) in all their phases, where phase < 0; else only `first`
  int phase;
  int64_t chunk;
};

struct Progress {
  std::atomic<int64_t> left{0};  // chunks of the current phase
  std::atomic<int> phase{0};     // phases before this one are finished
  void* workspace = nullptr;
};

class Run {
 public:
  Run(Op& op, int threads) : op_(op), progress_(static_cast<size_t>(op.items())) {
    int64_t elements = 0;
    for (int64_t i = 0; i < op.items(); ++i) elements += op.elements(i);
    const int64_t useful = std::max<int64_t>(1, std::min<int64_t>(threads, elements / kPerThread + 1));
    plan(useful, elements);
    threads_ = static_cast<int>(std::min<int64_t>(useful, static_cast<int64_t>(tasks_.size())));
  }

  size_t go() {
    parallel(threads_, [this](int) { work(); });
    return workspace_.total();
  }

 private:
  // An item is done whole by one thread where what comes after it keeps the others as busy: nobody waits between its
  // phases, and a thread reads a second time what it has read first itself. The last items are divided among all.
  void plan(int64_t threads, int64_t left) {
    const int64_t items = op_.items();
    const int phases = op_.phases();
    int64_t batch = -1, batched = 0;
    const auto close = [&](int64_t end) {
      if (batch >= 0) tasks_.push_back({batch, end, -1, 0});
      batch = -1;
      batched = 0;
    };
    for (int64_t i = 0; i < items; ++i) {
      const int64_t size = op_.elements(i);
      left -= size;
      if (size <= kSmall) {
        if (batch < 0) batch = i;
        batched += size;
        if (batched >= kBatch) close(i + 1);
        continue;
      }
      close(i);
      if (left >= (threads - 1) * size) {
        tasks_.push_back({i, i + 1, -1, 0});
        continue;
      }
      progress_[static_cast<size_t>(i)].left = op_.chunks(i, 0);
      for (int phase = 0; phase < phases; ++phase) {
        for (int64_t c = 0; c < op_.chunks(i, phase); ++c) tasks_.push_back({i, i + 1, phase, c});
      }
    }
    close(items);
  }

  void work() {
    Scratch scratch;
    try {
      for (;;) {
        const size_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= tasks_.size() || failed_.load(std::memory_order_relaxed)) return;
        const Task& task = tasks_[ticket];
        if (task.phase < 0) {
          for (int64_t i = task.first; i < task.last; ++i) whole(i, scratch);
        } else {
          part(task, scratch);
        }
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failed_ = true;
      turned_.notify_all();
      throw;
    }
  }

  void whole(int64_t item, Scratch& scratch) {
    void* workspace = take(item);
    for (int phase = 0; phase < op_.phases(); ++phase) {
      for (int64_t c = 0; c < op_.chunks(item, phase); ++c) op_.chunk(item, phase, c, workspace, scratch);
      op_.finish(item, phase, workspace);
    }
    give(workspace);
  }

  void part(const Task& task, Scratch& scratch) {
    Progress& p = progress_[static_cast<size_t>(task.first)];
    await(p, task.phase);
    if (failed_.load(std::memory_order_relaxed)) return;
    if (task.phase == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!p.workspace) p.workspace = workspace_.take(op_.workspace_bytes(task.first));
    }
    op_.chunk(task.first, task.phase, task.chunk, p.workspace, scratch);
    if (p.left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    op_.finish(task.first, task.phase, p.workspace);
    if (task.phase + 1 == op_.phases()) return give(p.workspace);
    p.left.store(op_.chunks(task.first, task.phase + 1), std::memory_order_relaxed);
    std::lock_guard<std::mutex> lock(mutex_);
    p.phase.store(task.phase + 1, std::memory_order_release);
    turned_.notify_all();
  }

  // Tickets are taken in order and an item's earlier phases come first: whoever is waited for is at work.
  void await(Progress& p, int phase) {
    for (int spin = 0; spin < 200; ++spin) {
      if (p.phase.load(std::memory_order_acquire) >= phase) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    turned_.wait(lock, [&] { return p.phase.load(std::memory_order_acquire) >= phase || failed_.load(); });
  }

  void* take(int64_t item) {
    std::lock_guard<std::mutex> lock(mutex_);
    return workspace_.take(op_.workspace_bytes(item));
  }

  void give(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    workspace_.give(block);
  }

  Op& op_;
  std::vector<Task> tasks_;
  std::vector<Progress> progress_;
  int threads_ = 1;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable turned_;
  Workspace workspace_;
};

}  // namespace

void Scratch::Free::operator()(void* p) const { ::operator delete(p, kLine); }

void* Scratch::at(Slot slot, size_t bytes) {
  if (size_[slot] < bytes) {
    memory_[slot].reset();
    memory_[slot].reset(::operator new(bytes, kLine));
    size_[slot] = bytes;
  }
  return memory_[slot].get();
}

Workspace::~Workspace() {
  for (const Block& block : blocks_) ::operator delete(block.memory, kLine);
}

void* Workspace::take(size_t bytes) {
  if (bytes == 0) return nullptr;
  for (Block& block : blocks_) {
    if (!block.used && block.bytes >= bytes) {
      block.used = true;
      return block.memory;
    }
  }
  // No free block is large enough: one of them makes room, so that a list of growing matrices does not keep them all.
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (blocks_[b].used) continue;
    ::operator delete(blocks_[b].memory, kLine);
    total_ -= blocks_[b].bytes;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(b));
    break;
  }
  blocks_.push_back({nullptr, bytes, true});
  blocks_.back().memory = ::operator new(bytes, kLine);
  total_ += bytes;
  return blocks_.back().memory;
}

void Workspace::give(void* memory) {
  for (Block& block : blocks_) {
    if (block.memory == memory) block.used = false;
  }
}

size_t run(Op& op, int threads) { return op.items() == 0 ? 0 : Run(op, threads).go(); }

}  // namespace hfac
