// The CPU kernels' pool and schedule, without kernels: ops that write what they must, stepped by several callers at
// once. Prints "right" and the number of calls, and ends with status 1 where something is not. With an argument it
// plants a fault: "race" makes chunks share a counter, "overrun" makes one write behind its block.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "../../csrc/cpu/schedule.h"
#include "../../csrc/cpu/threads.h"

namespace {

long shared_counter = 0;
std::string fault;

// Phase 0 writes a partial sum for each chunk into the workspace, `finish` adds them up, phase 1 writes the sum back.
struct Sums : hfac::Op {
  std::vector<int64_t> sizes;
  std::vector<std::vector<double>> values;
  std::vector<double> totals;
  int64_t throws_at = -1;

  explicit Sums(std::vector<int64_t> given) : sizes(std::move(given)), totals(sizes.size()) {
    for (int64_t size : sizes) values.emplace_back(static_cast<size_t>(size), 1.0);
  }
  int64_t items() const override { return static_cast<int64_t>(sizes.size()); }
  int64_t elements(int64_t i) const override { return sizes[static_cast<size_t>(i)]; }
  int phases() const override { return 2; }
  int64_t chunks(int64_t i, int) const override { return elements(i) / 4096 + 1; }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(chunks(i, 0)) * sizeof(double); }
  void reserve(hfac::Scratch& scratch) const override { scratch.reserve<char>(hfac::Scratch::kParam, 4096); }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, hfac::Scratch& scratch) override {
    if (i == throws_at && phase == 1 && c == 0) throw std::runtime_error("planted");
    if (fault == "race") ++shared_counter;
    std::memset(scratch.at<char>(hfac::Scratch::kParam, 4096), static_cast<int>(c), 4096);
    auto& mine = values[static_cast<size_t>(i)];
    auto* partial = static_cast<double*>(workspace);
    if (fault == "overrun") partial[chunks(i, 0)] = 1;
    const int64_t end = std::min<int64_t>(elements(i), (c + 1) * 4096);
    double sum = 0;
    for (int64_t k = c * 4096; k < end; ++k) {
      if (phase == 0)
        sum += mine[static_cast<size_t>(k)];
      else
        mine[static_cast<size_t>(k)] = totals[static_cast<size_t>(i)];
    }
    if (phase == 0) partial[c] = sum;
  }

  void finish(int64_t i, int phase, void* workspace) override {
    if (phase != 0) return;
    double& total = totals[static_cast<size_t>(i)] = 0;
    for (int64_t c = 0; c < chunks(i, 0); ++c) total += static_cast<double*>(workspace)[c];
  }

  bool right() const {
    for (size_t i = 0; i < sizes.size(); ++i) {
      for (double value : values[i]) {
        if (value != static_cast<double>(sizes[i])) return false;
      }
    }
    return true;
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) fault = arguments[1];
  std::atomic<int> right{0}, wrong{0}, thrown{0};
  const auto caller = [&](int seed) {
    for (int round = 0; round < 30; ++round) {
      Sums large({200000, 1, 40000, 70000, 33000, 0, 5000, 90000}), small({100, 200, 300});
      large.throws_at = (round + seed) % 5 == 0 ? 3 : -1;
      try {
        hfac::run({&large, &small}, 1 + (round + seed) % 4);
        ++(large.right() && small.right() && large.throws_at < 0 ? right : wrong);
      } catch (const std::runtime_error&) {
        ++(large.throws_at >= 0 ? thrown : wrong);
      }
    }
  };
  std::vector<std::thread> callers;
  for (int seed = 0; seed < 3; ++seed) callers.emplace_back(caller, seed);
  for (std::thread& one : callers) one.join();
  std::printf("right %d thrown %d wrong %d\n", right.load(), thrown.load(), wrong.load());
  return wrong != 0 || right != 72 || thrown != 18;
}
