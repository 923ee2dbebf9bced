// Blocks and their threads on the host, errors and faults that tests inject.
#include "emulation.h"

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hfac {
namespace emulation {

thread_local Lane* self = nullptr;

namespace {

std::string block_order = "forward";
std::string threading = "fibers";
int64_t launches = 0;

struct Injected {
  int code = 0;
  std::string text;
  int64_t launches = 0;  // before it comes
};
Injected error;
std::string reported;  // what `cudaGetErrorString` returns
std::string fault;
std::string running;  // the launch, where something is done wrong in it
std::unique_ptr<char[]> shared_memory;
size_t shared_bytes = 0;
std::map<const char*, size_t> memory;

void choose(std::string& setting, const std::string& name, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    std::string all;
    for (const std::string& one : known) all += (all.empty() ? "'" : ", '") + one + "'";
    throw std::invalid_argument("one of " + all + " is needed, not '" + name + "'");
  }
  setting = name;
}

std::vector<unsigned> ordered(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (block_order == "reverse") std::reverse(order.begin(), order.end());
  if (block_order == "shuffled") std::shuffle(order.begin(), order.end(), std::mt19937(blocks));
  return order;
}

// How the threads of one block meet; one of the two below.
class Team {
 public:
  explicit Team(unsigned threads) : lanes_(threads), slots_(2 * 32 * ((threads + 31) / 32)) {}
  virtual ~Team() = default;
  virtual void block_barrier() = 0;
  virtual void warp_barrier() = 0;
  // `order` has the blocks that run, of a grid of so many.
  virtual void run(const std::vector<unsigned>& order, unsigned blocks, const std::function<void()>& kernel) = 0;
  uint64_t* slots(unsigned turn) { return &slots_[(self->thread.x / 32 * 2 + turn % 2) * 32]; }

 protected:
  void prepare(unsigned thread, unsigned block, unsigned blocks) {
    const auto threads = static_cast<unsigned>(lanes_.size());
    lanes_[thread] = Lane{{thread, 0, 0}, {block, 0, 0}, {threads, 1, 1}, {blocks, 1, 1}, 0, 0, {{}}};
  }
  std::vector<Lane> lanes_;
  std::vector<uint64_t> slots_;
};

Team* team = nullptr;

class Threads : public Team {
 public:
  explicit Threads(unsigned threads) : Team(threads), block_(threads) {
    for (unsigned first = 0; first < threads; first += 32) {
      warps_.push_back(std::make_unique<std::barrier<>>(std::min(32u, threads - first)));
    }
  }
  void block_barrier() override { block_.arrive_and_wait(); }
  void warp_barrier() override { warps_[self->thread.x / 32]->arrive_and_wait(); }
  void run(const std::vector<unsigned>& order, unsigned blocks, const std::function<void()>& kernel) override {
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < lanes_.size(); ++t) {
      threads.emplace_back([&, t] {
        self = &lanes_[t];
        for (const unsigned block : order) {
          prepare(t, block, blocks);
          kernel();
          block_.arrive_and_wait();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  std::barrier<> block_;
  std::vector<std::unique_ptr<std::barrier<>>> warps_;
};

// A fiber's saved place: a stack pointer, whose stack holds the callee-saved registers.
#if defined(__x86_64__)
using Place = void*;
asm(R"(
.text
.globl hfac_emulation_switch
.type hfac_emulation_switch, @function
hfac_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hfac_emulation_switch, .-hfac_emulation_switch
)");
extern "C" void hfac_emulation_switch(void** from, void** to);

void switch_to(Place& from, Place& to) { hfac_emulation_switch(&from, &to); }

void start_at(Place& place, char* stack, size_t bytes, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // of frames that were left without a return
#endif
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  top -= 2;  // the entry sees a stack pointer that is 8 beyond a multiple of 16, as after a call
  *top = reinterpret_cast<void*>(entry);
  place = top - 6;
}
#else
using Place = ucontext_t;
void switch_to(Place& from, Place& to) { swapcontext(&from, &to); }
void start_at(Place& place, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = bytes;
  makecontext(&place, entry, 0);
}
#endif

class Fibers : public Team {
 public:
  explicit Fibers(unsigned threads) : Team(threads), fibers_(threads), warps_((threads + 31) / 32) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  void block_barrier() override { wait(block_, 0, static_cast<unsigned>(lanes_.size())); }
  void warp_barrier() override {
    const unsigned warp = self->thread.x / 32, end = std::min(warp * 32 + 32, static_cast<unsigned>(lanes_.size()));
    wait(warps_[warp], warp * 32, end);
  }

  void run(const std::vector<unsigned>& order, unsigned blocks, const std::function<void()>& kernel) override {
    kernel_ = &kernel;
    for (const unsigned block : order) {
      for (unsigned t = 0; t < lanes_.size(); ++t) {
        prepare(t, block, blocks);
        fibers_[t].ready = true;
        start_at(fibers_[t].place, fibers_[t].stack.get(), kStack, &Fibers::enter);
      }
      now_ = 0;
      left_ = static_cast<unsigned>(lanes_.size());
      self = &lanes_[0];
      switch_to(home_, fibers_[0].place);
    }
    self = nullptr;
  }

 private:
  static constexpr size_t kStack = 128 * 1024;
  struct Fiber {
    Place place;
    std::unique_ptr<char[]> stack;
    bool ready;  // neither done nor at a barrier
  };

  static void enter() {
    auto* fibers = static_cast<Fibers*>(team);
    (*fibers->kernel_)();
    fibers->fibers_[fibers->now_].ready = false;
    fibers->leave(--fibers->left_ == 0);
    std::abort();  // a finished fiber is never resumed
  }

  // Until `arrived` fibers are all those in [first, end).
  void wait(unsigned& arrived, unsigned first, unsigned end) {
    fibers_[now_].ready = ++arrived == end - first;
    if (!fibers_[now_].ready) return leave(false);
    arrived = 0;
    for (unsigned t = first; t < end; ++t) fibers_[t].ready = true;
  }

  // To the next fiber that can run, or back to `run`.
  void leave(bool finished) {
    const unsigned from = now_;
    if (finished) return switch_to(fibers_[from].place, home_);
    const auto count = static_cast<unsigned>(fibers_.size());
    unsigned next = from;
    do {
      next = next + 1 == count ? 0 : next + 1;
      if (fibers_[next].ready) {
        now_ = next;
        self = &lanes_[next];
        return switch_to(fibers_[from].place, fibers_[next].place);
      }
    } while (next != from);
    std::fprintf(stderr, "hfac emulation: a barrier that not every thread of block %u reaches\n", self->block.x);
    std::abort();
  }

  std::vector<Fiber> fibers_;
  unsigned block_ = 0;  // fibers at its barrier
  std::vector<unsigned> warps_;
  const std::function<void()>* kernel_ = nullptr;
  Place home_{};
  unsigned now_ = 0, left_ = 0;
};

}  // namespace

void block_barrier() {
  if (fault == "barrier" && running == "smmf_tiles" && self->barriers++ == 0) return;
  team->block_barrier();
}
void warp_barrier() { team->warp_barrier(); }
uint64_t* slots(unsigned turn) { return team->slots(turn); }

void begin_copy(void* to, const void* from, size_t bytes, size_t read) {
  memset(to, 0xff, bytes);
  self->copies.back().push_back({to, from, bytes, read});
}

void commit_copies() { self->copies.emplace_back(); }

void wait_for_copies(size_t left) {
  if (fault == "wait" && (running == "hfac_stats" || running == "hfac_small")) return;
  std::vector<std::vector<Copy>>& groups = self->copies;
  while (groups.size() - 1 > left) {
    for (const Copy& copy : groups.front()) {
      if (copy.read) memcpy(copy.to, copy.from, copy.read);
      memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
    }
    groups.erase(groups.begin());
  }
}

char* dynamic_shared() { return shared_memory.get(); }

void run_grid(const char* name, unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel) {
  ++launches;
  if (error.code) --error.launches;
  if (threading == "none") return;
  running = fault.empty() ? "" : name;
  // Its exact size, so that a sanitizer sees what is beyond.
  if (shared != shared_bytes) shared_memory.reset(shared ? new char[shared] : nullptr);
  shared_bytes = shared;
  if (shared) memset(shared_memory.get(), 0xff, shared);
  static std::map<unsigned, std::unique_ptr<Fibers>> teams;  // by their threads: stacks are worth keeping
  std::vector<unsigned> order = ordered(blocks);
  if (fault == "block" && running == "smmf_tiles") order.erase(std::find(order.begin(), order.end(), blocks - 1));
  std::unique_ptr<Threads> of_this_grid;
  if (threading == "threads") {
    of_this_grid = std::make_unique<Threads>(threads);
    team = of_this_grid.get();
  } else {
    std::unique_ptr<Fibers>& kept = teams[threads];
    if (!kept) kept = std::make_unique<Fibers>(threads);
    team = kept.get();
  }
  team->run(order, blocks, kernel);
  team = nullptr;
  running.clear();
}

void set_block_order(const std::string& order) { choose(block_order, order, {"forward", "reverse", "shuffled"}); }
void set_threading(const std::string& name) { choose(threading, name, {"fibers", "threads", "none"}); }
void inject_fault(const std::string& name) { choose(fault, name, {"", "barrier", "block", "wait"}); }
void inject_error(int code, const std::string& text, int64_t after) { error = {code, text, after}; }

void name_memory(const void* p, size_t bytes) { memory[static_cast<const char*>(p)] = bytes; }
void forget_memory(const void* p) { memory.erase(static_cast<const char*>(p)); }

void touches(const void* p, size_t bytes) {
  if (memory.empty()) return;
  const auto* const first = static_cast<const char*>(p);
  const auto after = memory.upper_bound(first);
  const auto found = after == memory.begin() ? after : std::prev(after);
  if (found->first <= first && first + bytes <= found->first + found->second) return;
  std::fprintf(stderr, "hfac emulation: %zu bytes at %p are not all in one buffer\n", bytes, p);
  std::_Exit(4);
}

int64_t take_launches() { return std::exchange(launches, 0); }

}  // namespace emulation
}  // namespace hfac

cudaError_t cudaGetLastError() {
  using hfac::emulation::error;
  if (error.code == 0 || error.launches > 0) return cudaSuccess;
  hfac::emulation::reported = error.text;
  return static_cast<cudaError_t>(std::exchange(error, {}).code);
}

const char* cudaGetErrorString(cudaError_t) { return hfac::emulation::reported.c_str(); }
