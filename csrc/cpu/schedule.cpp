// Divides the chunks of a list among threads.
#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <new>

#include "threads.h"

namespace hfac {
namespace {

constexpr std::align_val_t kLine{64};

Memory allocated(size_t bytes) { return Memory(::operator new(bytes, kLine)); }

// Items of up to this many elements are done whole, several in one task: a task should outweigh its bookkeeping.
constexpr int64_t kSmall = 32768;
constexpr int64_t kBatch = 16384;

// Elements that are worth handing to another thread, and those worth waking one for.
constexpr int64_t kPerThread = 32768;
constexpr int64_t kPerSleeper = 65536;

struct Task {
  int64_t first, last;  // items [first, last) in all their phases, where phase < 0; else a chunk of `first`
  int phase;
  size_t shares;  // where the phase's entries in `taken_` begin
};

// Every phase goes back over what the one before left in the caches.
int64_t in_order(int phase, int64_t k, int64_t chunks) { return phase % 2 == 0 ? k : chunks - 1 - k; }

struct Progress {
  std::atomic<int64_t> left{0};  // chunks of the current phase
  std::atomic<int> phase{0};     // phases before this one are finished
  void* workspace = nullptr;
};

// Memory for partial sums of the items under way, which are at most as many as threads: a block for each of the
// largest, reserved before any thread writes. Taken by an item's first chunk, given back when it is finished, and used
// again by the next.
class Workspace {
 public:
  // `wanted`: by item. Called once.
  void reserve(std::vector<size_t> wanted, size_t blocks) {
    blocks = std::min(blocks, wanted.size());
    std::partial_sort(wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(blocks), wanted.end(),
                      std::greater<size_t>());
    blocks_.reserve(blocks);
    for (size_t b = blocks; b-- > 0;) {
      if (wanted[b] == 0) continue;
      blocks_.push_back({allocated(wanted[b]), wanted[b], false});
      total_ += wanted[b];
    }
  }

  // The smallest block that is free and large enough, or null: an item that needs no more than this has it, and will
  // give it back.
  void* take(size_t bytes) {
    for (Block& block : blocks_) {
      if (block.used || block.bytes < bytes) continue;
      block.used = true;
      return block.memory.get();
    }
    return nullptr;
  }

  void give(void* memory) {
    for (Block& block : blocks_) {
      if (block.memory.get() == memory) block.used = false;
    }
  }

  size_t total() const { return total_; }

 private:
  struct Block {
    Memory memory;
    size_t bytes;
    bool used;
  };
  std::vector<Block> blocks_;  // ascending
  size_t total_ = 0;
};

class Run {
 public:
  Run(Op& op, int threads) : op_(op), progress_(static_cast<size_t>(op.items())) {
    int64_t elements = 0;
    for (int64_t i = 0; i < op.items(); ++i) elements += op.elements(i);
    const int64_t share = threads > 1 && threads_are_awake() ? kPerThread : kPerSleeper;
    const int64_t useful = std::max<int64_t>(1, std::min<int64_t>(threads, elements / share + 1));
    threads_ = useful;
    plan(useful, elements);
    const int count = static_cast<int>(std::min<int64_t>(useful, static_cast<int64_t>(tasks_.size())));
    scratch_ = std::vector<Scratch>(static_cast<size_t>(std::max(count, 1)));
    for (Scratch& scratch : scratch_) op.reserve(scratch);
    std::vector<size_t> bytes;
    for (int64_t i = 0; i < op.items(); ++i) bytes.push_back(op.workspace_bytes(i));
    workspace_.reserve(std::move(bytes), scratch_.size());
  }

  void go() {
    parallel(static_cast<int>(scratch_.size()), [this](int index) { work(index); });
  }

  size_t workspace() const { return workspace_.total(); }

 private:
  // An item is done whole by one thread if what follows keeps the others as busy: no thread waits between its
  // phases, and a thread reads a second time what it has read first itself. The last items are divided among all.
  void plan(int64_t threads, int64_t left) {
    const int64_t items = op_.items();
    const int phases = op_.phases();
    int64_t batch = -1, batched = 0;
    size_t shares = 0;
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
        for (int64_t c = 0; c < op_.chunks(i, phase); ++c) tasks_.push_back({i, i + 1, phase, shares});
        shares += static_cast<size_t>(threads);
      }
    }
    close(items);
    taken_ = std::vector<std::atomic<int64_t>>(shares);
  }

  // A chunk of the task's phase that nobody has taken: of the thread's own share, which is the same rows in every phase
  // and every step and may be in its caches still, or else of another's. There are as many tasks as chunks.
  int64_t take_chunk(const Task& task, int64_t thread) {
    const int64_t chunks = op_.chunks(task.first, task.phase);
    for (int64_t k = 0; k < threads_; ++k) {
      const int64_t share = (thread + k) % threads_;
      const int64_t first = chunks * share / threads_, count = chunks * (share + 1) / threads_ - first;
      const int64_t mine = taken_[task.shares + static_cast<size_t>(share)].fetch_add(1, std::memory_order_relaxed);
      if (mine < count) return first + in_order(task.phase, mine, count);
    }
    return -1;  // never
  }

  void work(int thread) {
    Scratch& scratch = scratch_[static_cast<size_t>(thread)];
    try {
      for (;;) {
        const size_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= tasks_.size() || failed_.load(std::memory_order_relaxed)) return;
        const Task& task = tasks_[ticket];
        if (task.phase < 0) {
          for (int64_t i = task.first; i < task.last; ++i) whole(i, scratch);
        } else {
          part(task, thread, scratch);
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
    void* workspace = nullptr;
    if (!take(item, workspace)) return;
    for (int phase = 0; phase < op_.phases(); ++phase) {
      const int64_t chunks = op_.chunks(item, phase);
      for (int64_t k = 0; k < chunks; ++k) op_.chunk(item, phase, in_order(phase, k, chunks), workspace, scratch);
      op_.finish(item, phase, workspace);
    }
    give(workspace);
  }

  void part(const Task& task, int thread, Scratch& scratch) {
    Progress& p = progress_[static_cast<size_t>(task.first)];
    await(p, task.phase);
    if (failed_.load(std::memory_order_relaxed)) return;
    if (task.phase == 0 && !take(task.first, p.workspace)) return;
    op_.chunk(task.first, task.phase, take_chunk(task, thread), p.workspace, scratch);
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
    for (int spin = 0; spin < 2000; ++spin) {  // for less time than it takes to wake up
      if (p.phase.load(std::memory_order_acquire) >= phase) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    turned_.wait(lock, [&] { return p.phase.load(std::memory_order_acquire) >= phase || failed_.load(); });
  }

  // A block for the item, unless it has one. A smaller item may be in the only block that is large enough; it needs
  // nothing more to get done. False where the call has failed.
  bool take(int64_t item, void*& block) {
    const size_t bytes = op_.workspace_bytes(item);
    if (bytes == 0) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    turned_.wait(lock, [&] { return block || (block = workspace_.take(bytes)) || failed_.load(); });
    return block;
  }

  void give(void* block) {
    if (!block) return;
    std::lock_guard<std::mutex> lock(mutex_);
    workspace_.give(block);
    turned_.notify_all();
  }

  Op& op_;
  int64_t threads_ = 1;
  std::vector<Task> tasks_;
  std::vector<std::atomic<int64_t>> taken_;  // chunks of every phase of a divided item, by thread whose share they are
  std::vector<Progress> progress_;
  std::vector<Scratch> scratch_;  // one for each thread
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable turned_;
  Workspace workspace_;
};

}  // namespace

void Free::operator()(void* p) const { ::operator delete(p, kLine); }

void Scratch::room(Slot slot, size_t bytes) {
  if (size_[slot] >= bytes) return;
  memory_[slot].reset();
  memory_[slot] = allocated(bytes);
  size_[slot] = bytes;
}

size_t run(std::initializer_list<Op*> ops, int threads) {
  std::vector<std::unique_ptr<Run>> runs;
  size_t workspace = 0;
  for (Op* const op : ops) {
    if (op->items() == 0) continue;
    runs.push_back(std::make_unique<Run>(*op, threads));
    workspace += runs.back()->workspace();
  }
  for (const auto& run : runs) run->go();
  return workspace;
}

}  // namespace hfac
