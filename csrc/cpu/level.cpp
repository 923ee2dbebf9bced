// Instruction sets that were compiled, and the choice among them.
#include "level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace hfac {

namespace plain {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*usable)();
};

// Ascending; the flags of each stand in setup.py.
const Level kLevels[] = {
    {"plain", &plain::kTable, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kTable, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }},
    {"avx512", &avx512::kTable,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};

const Level& find(const std::string& name) {
  const Level* best = nullptr;
  for (const Level& candidate : kLevels) {
    if (!name.empty() && name != candidate.name) continue;
    if (candidate.usable()) best = &candidate;
  }
  if (best) return *best;
  std::string usable;
  for (const std::string& other : levels(true)) usable += (usable.empty() ? "" : ", ") + other;
  throw std::invalid_argument("isa: '" + name + "' is not available here; available: " + usable);
}

std::atomic<const Level*> chosen{nullptr};

const Level& current() {
  const Level* now = chosen.load(std::memory_order_acquire);
  if (!now) {
    const char* wish = std::getenv("HFAC_CPU_ISA");
    now = &find(wish ? wish : "");
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

}  // namespace

const Kernels& kernels() { return *current().kernels; }

int64_t fetch_ahead() {
#if defined(__x86_64__)
  // Measured on Xeons, a Zen 4 and a Zen 3: what serves one of them best takes the others up to a quarter longer.
  static const int64_t ahead = !__builtin_cpu_is("amd") ? 512 : __builtin_cpu_supports("avx512f") ? kNextRows : 256;
  return ahead;
#else
  return 512;
#endif
}

std::vector<std::string> levels(bool usable) {
  std::vector<std::string> names;
  for (const Level& candidate : kLevels) {
    if (!usable || candidate.usable()) names.emplace_back(candidate.name);
  }
  return names;
}

std::string level() { return current().name; }

void set_level(const std::string& name) { chosen.store(&find(name), std::memory_order_release); }

}  // namespace hfac
