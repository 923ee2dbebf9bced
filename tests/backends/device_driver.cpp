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
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/step.h"
#include "device_memory.h"

namespace {

using hfac::DType;
using hfac::Item;
using hfac::OpKind;
using hfac::driver::Buffer;

struct Matrix {
  int64_t rows, cols, slices;
};

// How a parameter is kept.
struct Way {
  DType dtype;
  int64_t low_bytes;
  bool stochastic;
};
constexpr Way kPlain{DType::kFloat32, 0, false}, kDrawn{DType::kBFloat16, 0, true},
    kHalfDrawn{DType::kFloat16, 0, true}, kSplit{DType::kBFloat16, 2, false}, kSplit8{DType::kBFloat16, 1, false},
    kSplit8Drawn{DType::kBFloat16, 1, true};

// A fault that the driver itself injects: "workspace" gives 4 bytes too few; "signs" claims that signs go on to the end
// of their last word.
std::string fault;

// The same on every machine, to the bit: no function of the C library has a part in it.
float number(int64_t k, float scale) { return scale * static_cast<float>((k * 7919 + 131) % 2003 - 1001) / 1001.0f; }

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
  template <class T>
  void* put(const std::vector<T>& values) {
    const auto* const from = reinterpret_cast<const unsigned char*>(values.data());
    buffers_.emplace_back(std::vector<unsigned char>(from, from + values.size() * sizeof(T)));
    return buffers_.back().data();
  }
  void* numbers(int64_t count, float scale, float plus = 0.0f, DType dtype = DType::kFloat32) {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    for (int64_t k = 0; k < count; ++k) {
      const float x = number(k, scale) + plus;
      wide.push_back(x);
      narrow.push_back(dtype == DType::kFloat16 ? hfac::common::narrow(x, hfac::Float16()).bits
                                                : hfac::common::narrow(x, hfac::BFloat16()).bits);
    }
    if (dtype != DType::kFloat32) return put(narrow);
    floats_.push_back(buffers_.size());
    return put(wide);
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
  std::vector<size_t> floats_;  // indices of those that must be finite
};

// Parameters with their gradients and states. What is added after an item belongs to it.
struct Problem : Arena {
  std::vector<Item> items;
  std::vector<hfac::TensorRef> grads;

  // Moments are zeros, by row and column or, of a whole moment, by row alone.
  void item(int64_t rows, int64_t cols, int64_t count, const Way* way, bool whole = false) {
    Item item{};
    item.index = static_cast<int64_t>(items.size());
    item.rows = rows;
    item.cols = cols;
    if (way) item.param = {numbers(count, 1.0f, 0.0f, way->dtype), way->dtype, nullptr};
    if (way && (way->low_bytes || way->stochastic)) {
      hfac::Storage& storage = storages_.emplace_back();
      storage.low_bytes = way->low_bytes;
      if (way->low_bytes) storage.low = bytes(static_cast<size_t>(way->low_bytes * count), 0x11);
      storage.stochastic = way->stochastic;
      storage.bits = {3, 16, nullptr};
      item.param.storage = &storage;
    }
    for (void** const p : {&item.first_row, &item.second_row}) *p = numbers(rows, 0.0f);
    for (void** const p : {&item.first_col, &item.second_col}) *p = whole ? nullptr : numbers(cols, 0.0f);
    items.push_back(item);
  }
  void signs(int64_t slices, int64_t slice, size_t offset) {
    const int64_t each = (slice + 7) / 8;
    items.back().signs = {bytes(static_cast<size_t>(slices * each), 0, offset), slice, each};
    if (fault == "signs" && slices == 1) items.back().signs.slice_bytes += 3;
  }
  void codes(int64_t count) { items.back().codes = bytes(static_cast<size_t>(count), 0x31); }
  // Of a whole of so many rows and columns, with sums that others have made.
  hfac::Shard& shard(int64_t rows, int64_t cols, float scale, float plus) {
    const Item& item = items.back();
    hfac::Shard& shard = shards_.emplace_back();
    shard.rows = rows;
    shard.cols = cols;
    for (void** const p : {&shard.row_sum, &shard.row_square}) *p = numbers(item.rows, scale, plus);
    for (void** const p : {&shard.col_sum, &shard.col_square}) *p = numbers(item.cols, scale, plus);
    items.back().shard = &shard;
    return shard;
  }
  void grad(int64_t count, DType dtype = DType::kFloat32) {
    grads.push_back({numbers(count, 0.1f, 0.0f, dtype), dtype, nullptr});
  }

 private:
  std::deque<hfac::Storage> storages_;  // items point at entries
  std::deque<hfac::Shard> shards_;
};

struct Result {
  bool finite = true, same = true;  // same: alignment changed nothing
  uint64_t sum = 0xcbf29ce484222325u;
};

// The arguments of a step's launches, and memory that does not outlast it.
struct Passing {
  Arena arena;
  const void* table;
  hfac::Arguments arguments{};
  Passing(const hfac::Step& step, void* counters, int t) {
    std::vector<unsigned char> written(step.table_bytes());
    step.write_table(written.data());
    table = arena.put(written);
    const size_t fewer = fault == "workspace" ? 4 : 0;
    hfac::Arguments& a = arguments;
    a.workspace = reinterpret_cast<char*>(arena.bytes(step.workspace_bytes() - fewer, 0xff));
    a.counters = static_cast<int32_t*>(counters);
    a.scalars.lr.value = 0.01;
    a.scalars.weight_decay.value = 0.1;
    a.scalars.beta1.value = t > 1 ? 0.9 : 0.0;
    a.scalars.beta2.value = t > 1 ? 0.99 : 0.0;
    a.step.value = t;
    a.keys = hfac::keys_of(7);
    a.options.eps = 1e-8;
    a.options.clip = true;
  }
};

void launch(const hfac::Step& step, const Passing& passing) {
  step.launch(passing.table, passing.arguments, 0, hfac::driver::stream());
  hfac::driver::wait("the step");
}

struct Options {
  std::vector<Way> ways = {kPlain};  // of storing a parameter, one parameter after the other
  bool norm = false;  // statistics in a phase of their own, which stand in the second step and are taken again else
  DType grad = DType::kFloat32;
  size_t offset = 0;  // of the signs, from an aligned address
};

Result run(OpKind op, const std::vector<Matrix>& matrices, const Options& how = {}) {
  Problem problem;
  const bool dense = op == OpKind::kHfacDense || op == OpKind::kSmmfDense;
  for (const Matrix& m : matrices) {
    const int64_t count = m.rows * m.cols;
    problem.item(m.rows, m.cols, count, &how.ways[problem.items.size() % how.ways.size()], dense);
    if (op == OpKind::kSmmf) problem.signs(m.slices, count / m.slices, how.offset);
    if (op == OpKind::kHfacInt8) problem.codes(count);
    problem.grad(count, how.grad);
  }
  const size_t parameters = matrices.size();
  hfac::PlanOptions options{op};
  options.norm = how.norm;
  if (how.norm) options.l2_bytes = 4096;  // several groups
  hfac::Step step(problem.items, static_cast<int64_t>(parameters), options);
  unsigned char* const counters = problem.bytes(step.counter_bytes(), 0);
  Result result;
  for (int t = 1; t <= 3; ++t) {
    const bool flagged = t == 3;
    step.prepare(problem.grads, true, flagged);
    Passing passing(step, counters, t);
    hfac::Arguments& given = passing.arguments;
    if (flagged) given.nonfinite = reinterpret_cast<int32_t*>(passing.arena.bytes(parameters * sizeof(int32_t), 0xff));
    if (how.norm) {
      given.squares = reinterpret_cast<double*>(passing.arena.bytes(parameters * sizeof(double), 0xff));
      launch(step, passing);
      result.finite = result.finite && finite(passing.arena.get<double>(given.squares));
      given.squares = nullptr;
      given.clip = static_cast<const float*>(passing.arena.put(std::vector<float>{t == 2 ? 1.0f : 0.5f}));
    }
    if (t == 2) {  // added up in any order, so its bits are not compared
      const size_t bytes = parameters * hfac::kWatchedNumbers * sizeof(double);
      given.watched = reinterpret_cast<double*>(passing.arena.bytes(bytes, 0));
    }
    launch(step, passing);
    if (given.watched) result.finite = result.finite && finite(passing.arena.get<double>(given.watched));
  }
  result.finite = result.finite && problem.all_finite();
  problem.add_to(result.sum);
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
Result run_shards(OpKind op, const Way& way = kPlain) {
  Problem problem;
  if (op == OpKind::kSmmfSums) {
    // Rows 1 to 2.5 of a matrix 6 x 20, and columns 8 to 24 of every other row of one of 80 x 48.
    const std::vector<hfac::Block> rows = {{0, 20, 1, 1, 7, 1, 13}, {13, 20, 2, 1, 0, 1, 20}, {33, 20, 3, 1, 0, 1, 9}};
    const std::vector<hfac::Block> cols = {{0, 16, 0, 2, 8, 40, 16}};
    for (const auto& blocks : {rows, cols}) {
      const Matrix whole = problem.items.empty() ? Matrix{6, 20, 1} : Matrix{80, 48, 0};
      int64_t count = 0;
      for (const hfac::Block& block : blocks) count += block.rows * block.cols;
      problem.item(whole.rows, whole.cols, count, &way);
      problem.signs(1, count, static_cast<size_t>(whole.slices));
      problem.shard(whole.rows, whole.cols, 1.0f, 0.0f).blocks = blocks;
      problem.grad(count);
    }
  } else {
    const bool sums = op == OpKind::kHfacSums;
    for (const Matrix& m : std::vector<Matrix>{{24, 16, 1}, {19, 17, 1}, {300, 9, 1}, {0, 300, 1}}) {
      if (sums && m.rows == 0) continue;
      problem.item(m.rows, m.cols, m.rows * m.cols, sums ? nullptr : &way);
      if (op == OpKind::kHfacInt8Apply) problem.codes(m.rows * m.cols);
      // What is given must be positive, where it is a sum of squares.
      hfac::Shard& shard = problem.shard(m.rows + 3, m.cols + 5, 0.1f, 1.0f);
      shard.col_ratio = problem.numbers(m.cols, 0.1f, 1.0f);
      problem.grad(m.rows * m.cols);
    }
  }
  hfac::Step step(problem.items, static_cast<int64_t>(problem.items.size()), hfac::PlanOptions{op});
  step.prepare(problem.grads, false, false);
  Passing passing(step, nullptr, 5);
  passing.arguments.scalars.totals.value = 2.0;
  passing.arguments.scalars.mean_squares.value = 4.0;
  passing.arguments.scalars.old_totals.value = 3.0;
  launch(step, passing);
  Result result;
  result.finite = problem.all_finite();
  problem.add_to(result.sum);
  return result;
}

// kLong: left out where each CUDA thread is a std::thread, which would take minutes.
enum Length { kQuick, kFull, kLong };

struct Case {
  std::string name;
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
  stored.ways = stored_norm.ways = {kDrawn, kSplit, kSplit8, kSplit8Drawn, kHalfDrawn};
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
      {"hfac int8, stored", kQuick, op(OpKind::kHfacInt8, both, stored)},
      {"hfac int8 apply, stored", kFull, [] { return run_shards(OpKind::kHfacInt8Apply, kSplit8Drawn); }},
      {"smmf", kQuick, op(OpKind::kSmmf, small)},
      {"hfac", kQuick, op(OpKind::kHfac, small)},
      {"hfac, norm", kQuick, op(OpKind::kHfac, small, norm)},
      {"hfac int8", kQuick, op(OpKind::kHfacInt8, small)},
      {"hfac int8, norm", kFull, op(OpKind::kHfacInt8, small, norm)},
      {"hfac int8 apply", kQuick, [] { return run_shards(OpKind::kHfacInt8Apply); }},
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
  const Way brain_way{DType::kBFloat16, 0, false}, half_way{DType::kFloat16, 0, false};
  std::vector<Matrix> six = both;  // as `both`, one more of each kind
  six.insert(six.begin(), {48, 24, 1});
  six.push_back({11, 9, 11});
  Options brain = stored, mixed, half;
  brain.ways.push_back(brain_way);
  brain.grad = mixed.grad = DType::kBFloat16;
  half.ways = {half_way};
  half.grad = DType::kFloat16;
  Options wide;
  wide.ways = {brain_way};
  for (const OpKind kind : {OpKind::kHfac, OpKind::kSmmf, OpKind::kHfacInt8}) {
    const std::string name = kind == OpKind::kHfac ? "hfac" : kind == OpKind::kSmmf ? "smmf" : "hfac int8";
    all.push_back({name + ", bfloat16", kQuick, op(kind, six, brain)});
    all.push_back({name + ", float and bfloat16", kFull, op(kind, small, mixed)});
    all.push_back({name + ", bfloat16 and float", kFull, op(kind, small, wide)});
    all.push_back({name + ", float16", kFull, op(kind, small, half)});
  }
#endif
  return all;
}

int drive(Length longest, bool once) {
  if (!hfac::driver::open()) return 2;
  bool good = true;
  for (const Case& one : cases()) {
    if (one.length > longest) continue;
    hfac::driver::set_block_order("forward");
    const Result first = one.run();
    hfac::driver::set_block_order("reverse");
    const Result second = once ? first : one.run();
    const bool finite = first.finite && second.finite, same = first.same && first.sum == second.sum;
    good = good && finite && same;
    const char* const said = !finite ? "not finite: a partial sum was read that nobody wrote"
                             : !same ? "not the same bits twice"
                                     : "ok";
    std::printf("%-26s %016llx %s\n", one.name.c_str(), static_cast<unsigned long long>(first.sum), said);
    std::fflush(stdout);
  }
  return good ? 0 : 3;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, bool> given = {{"--quick", false}, {"--once", false}, {"--fibers", hfac::driver::kOnDevice}};
  for (int k = 1; k < argc; ++k) {
    const std::string option = argv[k];
    if (given.count(option)) {
      given[option] = true;
    } else if (option == "--fault" && k + 1 < argc) {
      fault = argv[++k];
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--once] and, on the host, [--fibers] [--fault NAME]\n", argv[0]);
      return 64;
    }
  }
  try {
    hfac::driver::set_threading(given["--fibers"] ? "fibers" : "threads");
    if (fault != "workspace" && fault != "signs") hfac::driver::inject_fault(fault);
    return drive(given["--quick"] ? kQuick : given["--fibers"] ? kLong : kFull, given["--once"]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
