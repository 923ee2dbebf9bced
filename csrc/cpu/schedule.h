// Who works on what, and when: a list of items (one parameter each), each done in phases of independent chunks.
//
// An item's chunks depend on its shape alone, and what they sum is added up in their order by `finish`; the bits of a
// result therefore do not depend on the number of threads nor on who was faster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace hfac {

// A thread's own memory for staged rows; it grows to what the largest request was and is freed with the call.
class Scratch {
 public:
  enum Slot { kParam, kGrad, kSigns, kOld, kSlots };
  void* at(Slot slot, size_t bytes);

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> memory_[kSlots];
  size_t size_[kSlots] = {};
};

// Memory for partial sums of the items under way: taken by an item's first chunk, given back when it is finished, and
// used again by the next.
class Workspace {
 public:
  ~Workspace();
  void* take(size_t bytes);
  void give(void* block);
  size_t total() const { return total_; }

 private:
  struct Block {
    void* memory;
    size_t bytes;
    bool used;
  };
  std::vector<Block> blocks_;
  size_t total_ = 0;
};

class Op {
 public:
  virtual ~Op() = default;
  virtual int64_t items() const = 0;
  virtual int64_t elements(int64_t item) const = 0;
  virtual int phases() const = 0;
  virtual int64_t chunks(int64_t item, int phase) const = 0;
  virtual size_t workspace_bytes(int64_t item) const = 0;
  virtual void chunk(int64_t item, int phase, int64_t c, void* workspace, Scratch& scratch) = 0;
  virtual void finish(int64_t item, int phase, void* workspace) = 0;
};

// Runs every phase of every item. Returns the bytes of workspace that were held at most.
size_t run(Op& op, int threads);

}  // namespace hfac
