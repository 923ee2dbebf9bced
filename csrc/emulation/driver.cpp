// A few steps of every op without torch, for runs under a sanitizer: every buffer has exactly its size, and the
// workspace is filled with NaN. Compiled for the host the kernels are emulated, each CUDA thread a std::thread; by nvcc
// for the device they are what an optimizer launches. `python -m bench.device_driver` builds both.
//
// Each op runs twice, on the host in the reverse order of blocks the second time, and must give the same bits. It
// prints a checksum of all parameters and states, which is the same on the host and on a GPU.
//
// Exit status: 0; 1 an error of CUDA; 2 there is no GPU; 3 numbers that are not finite, or other bits the second time.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/step.h"
#include "memory.h"

namespace {

using hfac::DType;
using hfac::Item;
using hfac::OpKind;
using hfac::driver::Buffer;

struct Matrix {
  int64_t rows, cols, slices;
};

// How a parameter is kept. From kBrain on to the nearest, for gradients of 16 bits.
enum Way { kPlain, kDrawn, kSplit, kSplit8, kSplit8Drawn, kFloat16, kBrain, kHalf };

// A fault that the driver itself injects: "workspace" gives 4 bytes too few; "signs" claims that signs go on to the end
// of their last word.
std::string fault;

// The same on every machine, to the bit: no function of the C library has a part in it.
float number(int64_t k, float scale) { return scale * static_cast<float>((k * 7919 + 131) % 2003 - 1001) / 1001.0f; }

uint16_t narrow(float x, DType dtype) {
  return dtype == DType::kFloat16 ? hfac::common::narrow_float16(x).bits : hfac::common::narrow_bfloat16(x).bits;
}

template <class T>
bool finite(const std::vector<T>& values) {
  for (const T x : values) {
    if (!std::isfinite(x)) return false;
  }
  return true;
}

class Arena {
 public:
  unsigned char* bytes(size_t count, unsigned char fill, size_t offset = 0) {
    buffers_.emplace_back(std::vector<unsigned char>(count, fill), offset);
    return buffers_.back().data();
  }
  float* floats(int64_t count, float scale, float plus = 0.0f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t k = 0; k < values.size(); ++k) values[k] = number(static_cast<int64_t>(k), scale) + plus;
    floats_.insert(buffers_.size());
    return static_cast<float*>(put(values));
  }
  // Of 16 bits each, or floats.
  void* numbers(int64_t count, float scale, DType dtype) {
    if (dtype == DType::kFloat32) return floats(count, scale);
    std::vector<uint16_t> values(static_cast<size_t>(count));
    for (size_t k = 0; k < values.size(); ++k) values[k] = narrow(number(static_cast<int64_t>(k), scale), dtype);
    return put(values);
  }
  void parameter(Item& item, int64_t count, int way) {
    const DType dtype = way == kPlain                     ? DType::kFloat32
                        : way == kFloat16 || way == kHalf ? DType::kFloat16
                                                          : DType::kBFloat16;
    item.param = {numbers(count, 1.0f, dtype), dtype, nullptr};
    hfac::Storage storage{};
    storage.low_bytes = way == kSplit ? 2 : way == kSplit8 || way == kSplit8Drawn ? 1 : 0;
    if (storage.low_bytes) storage.low = bytes(static_cast<size_t>(storage.low_bytes * count), 0x11);
    storage.stochastic = way == kDrawn || way == kSplit8Drawn || way == kFloat16;
    storage.bits = {3, 16, nullptr};
    if (!storage.low && !storage.stochastic) return;
    storages_.push_back(storage);
    item.param.storage = &storages_.back();
  }
  // Zeros, by row and column or, of a whole moment, by row alone.
  void moments(Item& item, bool whole) {
    for (void** const p : {&item.first_row, &item.second_row}) *p = floats(item.rows, 0.0f);
    for (void** const p : {&item.first_col, &item.second_col}) *p = whole ? nullptr : floats(item.cols, 0.0f);
  }
  hfac::Shard& shard() { return shards_.emplace_back(); }
  template <class T>
  void* put(const std::vector<T>& values) {
    const auto* const from = reinterpret_cast<const unsigned char*>(values.data());
    buffers_.emplace_back(std::vector<unsigned char>(from, from + values.size() * sizeof(T)));
    return buffers_.back().data();
  }
  template <class T>
  std::vector<T> get(const void* p) const {
    for (const Buffer& buffer : buffers_) {
      if (buffer.data() == p) return as<T>(buffer.read());
    }
    throw std::logic_error("no buffer begins there");
  }
  bool all_finite() const {
    for (const size_t k : floats_) {
      if (!finite(as<float>(buffers_[k].read()))) return false;
    }
    return true;
  }
  void add_to(uint64_t& sum) const {  // FNV-1a
    for (const Buffer& buffer : buffers_) {
      for (const unsigned char byte : buffer.read()) sum = (sum ^ byte) * 0x100000001b3u;
    }
  }

 private:
  template <class T>
  static std::vector<T> as(const std::vector<unsigned char>& bytes) {
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!bytes.empty()) memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  std::vector<Buffer> buffers_;
  std::deque<hfac::Storage> storages_;  // items point at entries
  std::deque<hfac::Shard> shards_;
  std::set<size_t> floats_;  // places of those that must be finite
};

struct Result {
  bool finite = true, same = true;  // same: alignment changed nothing
  uint64_t sum = 0xcbf29ce484222325u;
};

hfac::Arguments with_scalars(int step) {
  hfac::Arguments a{};
  hfac::Scalars& s = a.scalars;
  s.lr.value = 0.01;
  s.weight_decay.value = 0.1;
  s.beta1.value = step > 1 ? 0.9 : 0.0;
  s.beta2.value = step > 1 ? 0.99 : 0.0;
  a.step.value = step;
  a.keys = hfac::keys_of(7);
  a.options.eps = 1e-8;
  a.options.clip = true;
  return a;
}

// Memory of a step that does not last, and the arguments of its launches.
struct Passing {
  Arena arena;
  const void* table;
  hfac::Arguments arguments;
  Passing(const hfac::Step& step, void* counters, int t) : arguments(with_scalars(t)) {
    std::vector<unsigned char> table(step.table_bytes());
    step.write_table(table.data());
    this->table = arena.put(table);
    const size_t fewer = fault == "workspace" ? 4 : 0;
    arguments.workspace = reinterpret_cast<char*>(arena.bytes(step.workspace_bytes() - fewer, 0xff));
    arguments.counters = static_cast<int32_t*>(counters);
  }
};

void launch(const hfac::Step& step, const Passing& passing) {
  step.launch(passing.table, passing.arguments, 0, hfac::driver::stream());
  hfac::driver::wait("the step");
}

struct Options {
  std::vector<int> ways = {kPlain};  // of storing a parameter, one parameter after the other
  bool norm = false;  // statistics in a phase of their own, which stand in the second step and are taken again else
  DType grad = DType::kFloat32;
  size_t offset = 0;  // of the signs, from an aligned address
};

Result run(OpKind op, const std::vector<Matrix>& matrices, const Options& how = {}) {
  Arena arena;
  std::vector<Item> items;
  std::vector<hfac::TensorRef> grads;
  const bool dense = op == OpKind::kHfacDense || op == OpKind::kSmmfDense;
  for (const Matrix& m : matrices) {
    const int64_t count = m.rows * m.cols;
    Item item{};
    item.index = static_cast<int64_t>(items.size());
    arena.parameter(item, count, how.ways[items.size() % how.ways.size()]);
    item.rows = m.rows;
    item.cols = m.cols;
    arena.moments(item, dense);
    if (op == OpKind::kSmmf) {
      const int64_t slice = count / m.slices, bytes = (slice + 7) / 8;
      item.signs = {arena.bytes(static_cast<size_t>(m.slices * bytes), 0, how.offset), slice, bytes};
      if (fault == "signs" && m.slices == 1) item.signs.slice_bytes += 3;
    }
    items.push_back(item);
    grads.push_back({arena.numbers(count, 0.1f, how.grad), how.grad, nullptr});
  }
  hfac::PlanOptions options{op};
  options.norm = how.norm;
  if (how.norm) options.l2_bytes = 4096;  // several groups
  hfac::Step step(items, static_cast<int64_t>(items.size()), options);
  unsigned char* const counters = arena.bytes(step.counter_bytes(), 0);
  Result result;
  for (int t = 1; t <= 3; ++t) {
    const bool flagged = t == 3;
    step.prepare(grads, true, flagged);
    Passing passing(step, counters, t);
    hfac::Arguments& given = passing.arguments;
    if (flagged)
      given.nonfinite = reinterpret_cast<int32_t*>(passing.arena.bytes(items.size() * sizeof(int32_t), 0xff));
    if (how.norm) {
      unsigned char* const squares = passing.arena.bytes(items.size() * sizeof(double), 0xff);
      given.squares = reinterpret_cast<double*>(squares);
      launch(step, passing);
      result.finite = result.finite && finite(passing.arena.get<double>(squares));
      given.squares = nullptr;
      given.clip = static_cast<const float*>(passing.arena.put(std::vector<float>{t == 2 ? 1.0f : 0.5f}));
    }
    unsigned char* watched = nullptr;  // added up in any order, so its bits are not compared
    if (t == 2) watched = passing.arena.bytes(items.size() * hfac::kWatchedNumbers * sizeof(double), 0);
    given.watched = reinterpret_cast<double*>(watched);
    launch(step, passing);
    if (watched) result.finite = result.finite && finite(passing.arena.get<double>(watched));
  }
  result.finite = result.finite && arena.all_finite();
  arena.add_to(result.sum);
  return result;
}

// Signs of 1 to 7 bytes at every alignment, in one slice and in padded ones. The alignment must change no bit.
Result run_signs() {
  std::vector<Matrix> matrices;
  for (int64_t bytes = 1; bytes <= 7; ++bytes) {
    matrices.insert(matrices.end(), {{bytes, 8, 1}, {2, bytes * 4 - 1, 1}, {5, bytes, bytes}});
  }
  Result aligned;
  for (int offset = 0; offset < 4; ++offset) {
    Options how;
    how.offset = static_cast<size_t>(offset);
    const Result one = run(OpKind::kSmmf, matrices, how);
    if (offset == 0) aligned = one;
    aligned.finite = aligned.finite && one.finite;
    aligned.same = aligned.same && one.sum == aligned.sum;
  }
  return aligned;
}

// Shards of parameters: H-Fac's statistics and update, and SMMF's blocks, which share rows, columns and bytes of signs.
// A shard without rows has columns whose moments go on.
Result run_shards(OpKind op, int way = kPlain) {
  Arena arena;
  std::vector<Item> items;
  std::vector<hfac::TensorRef> grads;
  const auto add = [&](Item& item, const hfac::Shard& shard, int64_t count) {
    item.index = static_cast<int64_t>(items.size());
    item.shard = &shard;
    items.push_back(item);
    grads.push_back({arena.floats(count, 0.1f), DType::kFloat32, nullptr});
  };
  if (op == OpKind::kSmmfSums) {
    // Rows 1 to 2.5 of a matrix 6 x 20, and columns 8 to 24 of every other row of one of 80 x 48.
    const std::vector<hfac::Block> rows = {{0, 20, 1, 1, 7, 1, 13}, {13, 20, 2, 1, 0, 1, 20}, {33, 20, 3, 1, 0, 1, 9}};
    const std::vector<hfac::Block> cols = {{0, 16, 0, 2, 8, 40, 16}};
    for (const auto& blocks : {rows, cols}) {
      hfac::Shard& shard = arena.shard();
      shard.blocks = blocks;
      int64_t count = 0;
      for (const hfac::Block& block : blocks) count += block.rows * block.cols;
      Item item{};
      item.rows = shard.rows = items.empty() ? 6 : 80;
      item.cols = shard.cols = items.empty() ? 20 : 48;
      arena.parameter(item, count, way);
      arena.moments(item, false);
      const int64_t bytes = (count + 7) / 8;
      item.signs = {arena.bytes(static_cast<size_t>(bytes), 0, items.empty() ? 1 : 0), count, bytes};
      for (void** const sum : {&shard.row_sum, &shard.row_square}) *sum = arena.floats(item.rows, 1.0f);
      for (void** const sum : {&shard.col_sum, &shard.col_square}) *sum = arena.floats(item.cols, 1.0f);
      add(item, shard, count);
    }
  } else {
    const bool sums = op == OpKind::kHfacSums;
    for (const Matrix& m : std::vector<Matrix>{{24, 16, 1}, {19, 17, 1}, {300, 9, 1}, {0, 300, 1}}) {
      const int64_t count = m.rows * m.cols;
      if (sums && count == 0) continue;
      hfac::Shard& shard = arena.shard();
      Item item{};
      if (!sums) arena.parameter(item, count, way);
      item.rows = m.rows;
      item.cols = m.cols;
      arena.moments(item, false);
      shard.rows = m.rows + 3;
      shard.cols = m.cols + 5;
      // What is given must be positive, where it is a sum of squares.
      for (void** const p : {&shard.row_sum, &shard.row_square}) *p = arena.floats(m.rows, 0.1f, 1.0f);
      for (void** const p : {&shard.col_sum, &shard.col_square, &shard.col_ratio}) {
        *p = arena.floats(m.cols, 0.1f, 1.0f);
      }
      add(item, shard, count);
    }
  }
  hfac::Step step(items, static_cast<int64_t>(items.size()), hfac::PlanOptions{op});
  step.prepare(grads, false, false);
  Passing passing(step, nullptr, 5);
  passing.arguments.scalars.totals.value = 2.0;
  passing.arguments.scalars.mean_squares.value = 4.0;
  launch(step, passing);
  Result result;
  result.finite = arena.all_finite();
  arena.add_to(result.sum);
  return result;
}

// kLong: left out where each CUDA thread is a std::thread, which would take minutes.
enum Length { kQuick, kFull, kLong };

struct Case {
  const char* name;
  Length length;
  std::function<Result()> run;
};

std::vector<Case> cases() {
  const std::vector<Matrix> small = {{24, 16, 1}, {19, 17, 19}, {12, 12, 4}, {40, 264, 1}, {9, 8, 72}};
  // Each way with whole aligned vectors, then with neither.
  const std::vector<Matrix> both = {{24, 16, 1},  {16, 16, 1}, {32, 24, 1}, {24, 8, 1}, {40, 16, 1},
                                    {19, 17, 19}, {9, 9, 9},   {17, 9, 1},  {12, 9, 1}, {13, 9, 1}};
  const std::vector<Matrix> vectors = {{24, 1, 1}, {8200, 1, 1}, {7, 1, 1}, {30, 1, 1}, {9, 1, 1}};
  Options stored, norm, stored_norm;
  stored.ways = stored_norm.ways = {kDrawn, kSplit, kSplit8, kSplit8Drawn, kFloat16};
  norm.norm = stored_norm.norm = true;
  const auto op = [](OpKind kind, const std::vector<Matrix>& matrices, const Options& how = {}) {
    return [=] { return run(kind, matrices, how); };
  };
  std::vector<Case> all = {
      {"smmf, stored", kQuick, op(OpKind::kSmmf, both, stored)},
      {"hfac, stored", kQuick, op(OpKind::kHfac, both, stored)},
      {"smmf dense, stored", kQuick, op(OpKind::kSmmfDense, vectors, stored)},
      {"hfac dense, stored", kQuick, op(OpKind::kHfacDense, vectors, stored)},
      {"smmf parts, stored", kQuick, [] { return run_shards(OpKind::kSmmfSums, kSplit8Drawn); }},
      {"hfac apply, stored", kQuick, [] { return run_shards(OpKind::kHfacApply, kSplit); }},
      {"smmf", kQuick, op(OpKind::kSmmf, small)},
      {"hfac", kQuick, op(OpKind::kHfac, small)},
      {"hfac, norm", kQuick, op(OpKind::kHfac, small, norm)},
      {"hfac, norm, stored", kFull, op(OpKind::kHfac, both, stored_norm)},
      {"smmf dense", kFull, op(OpKind::kSmmfDense, {{24, 1, 1}, {8200, 1, 1}})},
      {"hfac dense", kFull, op(OpKind::kHfacDense, {{24, 1, 1}, {8200, 1, 1}})},
      {"smmf parts", kFull, [] { return run_shards(OpKind::kSmmfSums); }},
      {"hfac sums", kQuick, [] { return run_shards(OpKind::kHfacSums); }},
      {"hfac apply", kFull, [] { return run_shards(OpKind::kHfacApply); }},
      {"smmf, small signs", kLong, run_signs},
      {"hfac, long rows", kLong, op(OpKind::kHfac, {{5, 4104, 1}, {3, 14344, 1}, {5, 4099, 1}})},
  };
#if !defined(HFAC_FLOAT_OPERANDS)
  std::vector<Matrix> six = both;  // as `both`, one more of each kind
  six.insert(six.begin(), {48, 24, 1});
  six.push_back({11, 9, 11});
  Options brain = stored, mixed, half;
  brain.ways.push_back(kBrain);
  brain.grad = mixed.grad = DType::kBFloat16;
  half.ways = {kHalf};
  half.grad = DType::kFloat16;
  Options wide;
  wide.ways = {kBrain};
  for (const auto& [name, kind] : std::map<std::string, OpKind>{{"hfac", OpKind::kHfac}, {"smmf", OpKind::kSmmf}}) {
    const bool hfac = kind == OpKind::kHfac;
    all.push_back({hfac ? "hfac, bfloat16" : "smmf, bfloat16", kQuick, op(kind, six, brain)});
    all.push_back({hfac ? "hfac, float and bfloat16" : "smmf, float and bfloat16", kFull, op(kind, small, mixed)});
    all.push_back({hfac ? "hfac, bfloat16 and float" : "smmf, bfloat16 and float", kFull, op(kind, small, wide)});
    all.push_back({hfac ? "hfac, float16" : "smmf, float16", kFull, op(kind, small, half)});
  }
#endif
  return all;
}

#ifdef HFAC_DRIVER_DEVICE
// Exit status 2 where there is nothing to run on.
int open_device() {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) {
    std::fprintf(stderr, "no GPU: %s\n", found == cudaSuccess ? "no CUDA device" : cudaGetErrorString(found));
    return 2;
  }
  cudaDeviceProp properties;
  hfac::driver::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s, sm_%d%d\n", properties.name, properties.major, properties.minor);
  return 0;
}
void second_order(bool) {}
#else
int open_device() { return 0; }
void second_order(bool second) { hfac::emulation::set_block_order(second ? "reverse" : "forward"); }
#endif

int drive(Length longest, bool once) {
  if (const int status = open_device()) return status;
  bool good = true;
  for (const Case& one : cases()) {
    if (one.length > longest) continue;
    second_order(false);
    const Result first = one.run();
    second_order(true);
    const Result second = once ? first : one.run();
    const bool finite = first.finite && second.finite, same = first.same && first.sum == second.sum;
    good = good && finite && same;
    const char* const said = !finite ? "not finite: a partial sum was read that nobody wrote"
                             : !same ? "not the same bits twice"
                                     : "ok";
    std::printf("%-26s %016llx %s\n", one.name, static_cast<unsigned long long>(first.sum), said);
    std::fflush(stdout);
  }
  return good ? 0 : 3;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false, once = false, fibers = false;
  for (int k = 1; k < argc; ++k) {
    const std::string option = argv[k];
    if (option == "--quick") {
      quick = true;
    } else if (option == "--once") {
      once = true;
    } else if (option == "--fibers") {
      fibers = true;
    } else if (option == "--fault" && k + 1 < argc) {
      fault = argv[++k];
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--once] and, on the host, [--fibers] [--fault NAME]\n", argv[0]);
      return 64;
    }
  }
  try {
#ifdef HFAC_DRIVER_DEVICE
    fibers = true;
#else
    hfac::emulation::set_threading(fibers ? "fibers" : "threads");
    if (fault != "" && fault != "workspace" && fault != "signs") hfac::emulation::inject_fault(fault);
#endif
    return drive(quick ? kQuick : fibers ? kLong : kFull, once);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
