// OpenMP as torch has loaded it, by the names of GNU's library, which LLVM's and Intel's answer to as well. What the
// extension itself linked could be a second library, with threads of its own.
#include "team.h"

#if defined(__linux__)

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <exception>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <string>

namespace hfac {
namespace {

// GNU's waits for 300,000 rounds of a loop, which take no less than this.
constexpr std::chrono::milliseconds kAwake{2};

using Clock = std::chrono::steady_clock;
std::atomic<Clock::rep> last_end{0};

struct OpenMP {
  void (*run)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*index)() = nullptr;
  int (*most)() = nullptr;
  pid_t process = 0;
};

template <class Function>
bool find(void* library, const char* name, Function& to) {
  to = reinterpret_cast<Function>(dlsym(library, name));
  return to;
}

// Has this process been forked from another, and does it still run that one's program? PF_FORKNOEXEC of the kernel.
bool forked() {
  std::ifstream file("/proc/self/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t end = text.rfind(')');  // of the program's name
  if (end == std::string::npos) return true;
  std::istringstream rest(text.substr(end + 1));
  std::string skipped;
  unsigned long flags = 0;
  for (int k = 0; k < 6; ++k) rest >> skipped;
  return !(rest >> flags) || (flags & 0x40);
}

OpenMP look() {
  OpenMP found;
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  const bool there = torch && find(torch, "GOMP_parallel", found.run) &&
                     find(torch, "omp_get_thread_num", found.index) && find(torch, "omp_get_max_threads", found.most);
  if (there && !forked()) found.process = getpid();
  return found;
}

const OpenMP& openmp() {
  static const OpenMP found = look();
  return found;
}

struct Work {
  const std::function<void(int)>& body;
  int threads;
  std::fenv_t environment;  // the caller's
  std::mutex mutex;
  std::exception_ptr error;

  void of(int index) {
    if (index >= threads) return;
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&environment);
    try {
      body(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
    std::fesetenv(&before);
  }
};

void enter(void* work) { static_cast<Work*>(work)->of(openmp().index()); }

}  // namespace

bool team(int threads, const std::function<void(int)>& body) {
  const OpenMP& found = openmp();
  if (found.process != getpid() || found.most() < threads) return false;
  Work work{body, threads, {}, {}, {}};
  std::fegetenv(&work.environment);
  // All of torch's threads, though some may have nothing to do: asked for fewer, GNU's library ends the others.
  found.run(enter, &work, 0, 0);
  last_end = Clock::now().time_since_epoch().count();
  if (work.error) std::rethrow_exception(work.error);
  return true;
}

bool team_is_awake() { return Clock::now() - Clock::time_point(Clock::duration(last_end.load())) < kAwake; }

}  // namespace hfac

#else

namespace hfac {

bool team(int, const std::function<void(int)>&) { return false; }
bool team_is_awake() { return false; }

}  // namespace hfac

#endif
