// Who works on what, and when: a list of items (one parameter each), each done in phases of independent chunks.
//
// An item's chunks depend on its shape alone, and what they sum is added up in their order by `finish`; the bits of a
// result therefore do not depend on the number of threads nor on who was faster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace hfac {

struct Free {
  void operator()(void* p) const;
};
using Memory = std::unique_ptr<void, Free>;  // begins with a line of the cache

// A thread's own memory for staged rows, reserved before any thread writes, for at most the largest request, and freed
// with the call.
class Scratch {
 public:
  enum Slot { kParam, kGrad, kSigns, kCodes, kOld, kColumns, kSlots };
  // Room for `count` values of the type.
  template <class T>
  void reserve(Slot slot, int64_t count) {
    room(slot, static_cast<size_t>(count) * sizeof(T));
  }
  template <class T>
  T* at(Slot slot, int64_t count) {
    reserve<T>(slot, count);  // which has been done
    return static_cast<T*>(memory_[slot].get());
  }

 private:
  void room(Slot slot, size_t bytes);
  Memory memory_[kSlots];
  size_t size_[kSlots] = {};
};

class Op {
 public:
  virtual ~Op() = default;
  virtual int64_t items() const = 0;
  virtual int64_t elements(int64_t item) const = 0;
  virtual int phases() const = 0;
  virtual int64_t chunks(int64_t item, int phase) const = 0;
  virtual size_t workspace_bytes(int64_t item) const = 0;
  // Makes room for all that `chunk` asks of a thread's scratch.
  virtual void reserve(Scratch& scratch) const = 0;
  virtual void chunk(int64_t item, int phase, int64_t c, void* workspace, Scratch& scratch) = 0;
  virtual void finish(int64_t item, int phase, void* workspace) = 0;
};

// Runs every phase of every item of one op, then of the next. What needs memory is done before anything is written, so
// that std::bad_alloc leaves all as it was. Returns the bytes of workspace that were held.
size_t run(std::initializer_list<Op*> ops, int threads);

}  // namespace hfac
