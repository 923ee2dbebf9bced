// A few steps of every op on the emulated kernels, for runs under a sanitizer: every buffer has exactly its size, the
// workspace is filled with NaN, and each CUDA thread is a std::thread.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../cuda/step.h"
#include "emulation.h"

namespace {

using hfac::BoundGrad;
using hfac::BoundItem;
using hfac::DType;
using hfac::OpKind;

struct Aligned {
  explicit Aligned(size_t bytes, unsigned char fill) : data(static_cast<unsigned char*>(operator new(bytes, kAlign))) {
    for (size_t k = 0; k < bytes; ++k) data[k] = fill;
  }
  ~Aligned() { operator delete(data, kAlign); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  static constexpr std::align_val_t kAlign{16};
  unsigned char* data;
};

struct Matrix {
  int64_t rows, cols, slices;
};

enum Way { kPlain, kDrawn, kSplit, kSplit8, kSplit8Drawn, kFloat16, kWays };

class Arena {
 public:
  float* floats(int64_t count, float scale) {
    auto* p = reinterpret_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float), 0));
    for (int64_t k = 0; k < count; ++k) p[k] = scale * std::sin(static_cast<float>(k + 1));
    moments_.push_back({p, count});
    return p;
  }
  // A parameter of `count` elements: a float, or one of the ways to store it with more than one rounding to the nearest.
  void parameter(BoundItem& item, int64_t count, int way) {
    const auto size = static_cast<size_t>(count);
    if (way == kPlain) {
      item.param = {floats(count, 1.0f), DType::kFloat32, nullptr};
      return;
    }
    item.param = {bytes(2 * size, 0x3d), way == kFloat16 ? DType::kFloat16 : DType::kBFloat16, nullptr};
    if (way == kSplit) item.store.low = bytes(2 * size, 0x11);
    if (way == kSplit8 || way == kSplit8Drawn) item.store.low = bytes(size, 0x11);
    if (item.store.low) item.store.kind = way == kSplit ? hfac::Low::kInt16 : hfac::Low::kInt8;
    item.store.drawn = way == kDrawn || way == kSplit8Drawn || way == kFloat16;
    item.store.position = 3;
    item.store.first = 16;
  }
  unsigned char* bytes(size_t count, unsigned char fill) {
    blocks_.push_back(std::make_unique<Aligned>(count, fill));
    return blocks_.back()->data;
  }
  bool finite() const {
    for (const auto& [p, count] : moments_) {
      for (int64_t k = 0; k < count; ++k) {
        if (!std::isfinite(p[k])) return false;
      }
    }
    return true;
  }

 private:
  std::vector<std::unique_ptr<Aligned>> blocks_;
  std::vector<std::pair<float*, int64_t>> moments_;
};

// `stored`: each parameter in the next of the other ways than plain. `norm`: statistics in a phase of their own, which
// stand in the second step and are taken again in the others.
bool run(OpKind op, const std::vector<Matrix>& matrices, bool stored = false, bool norm = false) {
  Arena arena;
  std::vector<BoundItem> items;
  std::vector<BoundGrad> grads;
  const bool dense = op == OpKind::kHfacDense || op == OpKind::kSmmfDense;
  for (const Matrix& m : matrices) {
    const int64_t count = m.rows * m.cols;
    BoundItem item{};
    item.index = static_cast<int64_t>(items.size());
    arena.parameter(item, count, stored ? kDrawn + static_cast<int>(items.size()) % (kWays - 1) : kPlain);
    item.rows = m.rows;
    item.cols = m.cols;
    item.first_row = arena.floats(m.rows, 0.0f);
    item.second_row = arena.floats(m.rows, 0.0f);
    if (!dense) {
      item.first_col = arena.floats(m.cols, 0.0f);
      item.second_col = arena.floats(m.cols, 0.0f);
    }
    if (op == OpKind::kSmmf) {
      item.slice = count / m.slices;
      item.slice_bytes = (item.slice + 7) / 8;
      item.signs = arena.bytes(static_cast<size_t>(m.slices * item.slice_bytes), 0);
    }
    items.push_back(item);
    grads.push_back({arena.floats(count, 0.1f), DType::kFloat32, nullptr});
  }
  hfac::PlanOptions options{op};
  options.norm = norm;
  if (norm) options.l2_bytes = 4096;  // several groups
  hfac::Step step(items, static_cast<int64_t>(items.size()), options);
  unsigned char* const counters = arena.bytes(items.size() * sizeof(int32_t), 0);
  for (int t = 1; t <= 3; ++t) {
    const bool flagged = t == 3;
    step.prepare(grads, true, flagged);
    Arena passing;
    unsigned char* const table = passing.bytes(step.table_bytes(), 0);
    unsigned char* const workspace = passing.bytes(step.workspace_bytes(), 0xff);
    auto* const flags = reinterpret_cast<int32_t*>(passing.bytes(items.size() * sizeof(int32_t), 0xff));
    step.write_table(table);
    hfac::Scalars s{};
    s.lr.value = 0.01;
    s.weight_decay.value = 0.1;
    s.beta1.value = t > 1 ? 0.9 : 0.0;
    s.beta2.value = t > 1 ? 0.99 : 0.0;
    s.eps = 1e-8;
    s.clip_threshold = 1.0;
    s.clip = s.first = true;
    s.step.value = t;
    s.keys = hfac::keys_of(7);
    const hfac::Memory memory{table, workspace, counters};
    hfac::Given given;
    given.nonfinite = flagged ? flags : nullptr;
    const size_t numbers = items.size() * hfac::kWatchedNumbers;
    auto* const watched = reinterpret_cast<double*>(passing.bytes(numbers * sizeof(double), 0));
    if (norm) {
      given.squares = reinterpret_cast<double*>(passing.bytes(items.size() * sizeof(double), 0xff));
      step.launch(memory, s, given, 0, nullptr);
      for (size_t k = 0; k < items.size(); ++k) {
        if (!std::isfinite(given.squares[k])) return false;
      }
      given.squares = nullptr;
      auto* const clip = reinterpret_cast<float*>(passing.bytes(sizeof(float), 0));
      *clip = t == 2 ? 1.0f : 0.5f;
      given.clip = clip;
    }
    given.watched = t == 2 ? watched : nullptr;
    step.launch(memory, s, given, 0, nullptr);
    for (size_t k = 0; k < numbers; ++k) {
      if (!std::isfinite(watched[k])) return false;
    }
  }
  return arena.finite();
}

// Parts of parameters: H-Fac's statistics and update, and SMMF's blocks, which share rows, columns and bytes of signs.
// A part without rows has columns whose moments go on.
bool run_parts(OpKind op, int way = kPlain) {
  Arena arena;
  std::vector<BoundItem> items;
  std::vector<BoundGrad> grads;
  int64_t entries = 0;
  const auto add = [&](float* grad, BoundItem item, int64_t index) {
    item.index = index;
    items.push_back(item);
    grads.push_back({grad, DType::kFloat32, nullptr});
    entries = index + 1;
  };
  if (op == OpKind::kSmmfSums) {
    // Rows 1 to 2.5 of a matrix 6 x 20, and columns 8 to 24 of every other row of one of 80 x 48.
    const std::vector<std::vector<hfac::Part>> parts = {
        {{6, 20, {}, {}, 0, 20, 1, 1, 7, 0}, {6, 20, {}, {}, 13, 20, 2, 1, 0, 0}, {6, 20, {}, {}, 33, 20, 3, 1, 0, 0}},
        {{80, 48, {}, {}, 0, 16, 0, 2, 8, 0}}};
    const std::vector<std::vector<Matrix>> sizes = {{{1, 13, 1}, {1, 20, 1}, {1, 9, 1}}, {{40, 16, 1}}};
    for (size_t p = 0; p < parts.size(); ++p) {
      int64_t count = 0;
      for (const Matrix& m : sizes[p]) count += m.rows * m.cols;
      const int64_t rows = parts[p][0].rows, cols = parts[p][0].cols;
      float* const grad = arena.floats(count, 0.1f);
      BoundItem item{};
      arena.parameter(item, count, way);
      item.first_row = arena.floats(rows, 0.0f);
      item.first_col = arena.floats(cols, 0.0f);
      item.second_row = arena.floats(rows, 0.0f);
      item.second_col = arena.floats(cols, 0.0f);
      item.slice = count;
      item.slice_bytes = (count + 7) / 8;
      item.signs = arena.bytes(static_cast<size_t>(item.slice_bytes), 0);
      void *const row[2] = {arena.floats(rows, 1.0f), arena.floats(rows, 1.0f)};
      void *const col[2] = {arena.floats(cols, 1.0f), arena.floats(cols, 1.0f)};
      for (size_t b = 0; b < parts[p].size(); ++b) {
        item.part = parts[p][b];
        item.rows = sizes[p][b].rows;
        item.cols = sizes[p][b].cols;
        for (int k = 0; k < 2; ++k) {
          item.part.row[k] = row[k];
          item.part.col[k] = col[k];
        }
        item.part.blocks = b == 0 ? static_cast<int64_t>(parts[p].size()) : 0;
        add(grad, item, static_cast<int64_t>(p));
      }
    }
  } else {
    const bool sums = op == OpKind::kHfacSums;
    for (const Matrix& m : std::vector<Matrix>{{24, 16, 1}, {19, 17, 1}, {300, 9, 1}, {0, 300, 1}}) {
      const int64_t count = m.rows * m.cols;
      if (sums && count == 0) continue;
      BoundItem item{};
      if (!sums) arena.parameter(item, count, way);
      item.rows = m.rows;
      item.cols = m.cols;
      item.first_row = arena.floats(m.rows, 0.0f);
      item.first_col = arena.floats(m.cols, 0.0f);
      item.second_row = arena.floats(m.rows, 0.0f);
      item.second_col = arena.floats(m.cols, 0.0f);
      item.part.rows = m.rows + 3;
      item.part.cols = m.cols + 5;
      // What is given must be positive, where it is a sum of squares.
      const auto given = [&](int64_t size) {
        float* p = arena.floats(size, 0.1f);
        for (int64_t k = 0; k < size; ++k) p[k] += 1.0f;
        return p;
      };
      for (void*& p : item.part.row) p = given(m.rows);
      for (void*& p : item.part.col) p = given(m.cols);
      float* const grad = arena.floats(count, 0.1f);
      add(grad, item, static_cast<int64_t>(items.size()));
    }
  }
  hfac::Step step(items, entries, hfac::PlanOptions{op});
  step.prepare(grads, false, false);
  unsigned char* const table = arena.bytes(step.table_bytes(), 0);
  unsigned char* const workspace = arena.bytes(step.workspace_bytes(), 0xff);
  step.write_table(table);
  hfac::Scalars s{};
  s.lr.value = 0.01;
  s.weight_decay.value = 0.1;
  s.beta1.value = 0.9;
  s.beta2.value = 0.99;
  s.totals.value = 2.0;
  s.mean_squares.value = 4.0;
  s.eps = 1e-8;
  s.clip_threshold = 1.0;
  s.clip = s.first = true;
  s.step.value = 5;
  s.keys = hfac::keys_of(7);
  step.launch({table, workspace, nullptr}, s, {}, 0, nullptr);
  return arena.finite();
}

}  // namespace

int main(int argc, char** argv) {
  hfac::emulation::set_threading(argc > 1 ? argv[1] : "threads");
  const std::vector<Matrix> matrices = {{24, 16, 1}, {19, 17, 19}, {12, 12, 4}, {40, 264, 1}, {9, 8, 72}};
  // Each way with whole aligned vectors, then with neither.
  const std::vector<Matrix> stored = {{24, 16, 1}, {16, 16, 1}, {32, 24, 1}, {24, 8, 1}, {40, 16, 1},
                                      {19, 17, 19}, {9, 9, 9},  {17, 9, 1},  {12, 9, 1}, {13, 9, 1}};
  const std::vector<Matrix> vectors = {{24, 1, 1}, {8200, 1, 1}, {7, 1, 1}, {30, 1, 1}, {9, 1, 1}};
  const bool finite = run(OpKind::kSmmf, stored, true) & run(OpKind::kHfac, stored, true) &
                      run(OpKind::kSmmfDense, vectors, true) & run(OpKind::kHfacDense, vectors, true) &
                      run_parts(OpKind::kSmmfSums, kSplit8Drawn) & run_parts(OpKind::kHfacApply, kSplit) &
                      run(OpKind::kSmmf, matrices) & run(OpKind::kHfac, matrices) &
                      run(OpKind::kHfac, matrices, false, true) & run(OpKind::kHfac, stored, true, true) &
                      run(OpKind::kSmmfDense, {{24, 1, 1}, {8200, 1, 1}}) &
                      run(OpKind::kHfacDense, {{24, 1, 1}, {8200, 1, 1}}) & run_parts(OpKind::kSmmfSums) &
                      run_parts(OpKind::kHfacSums) & run_parts(OpKind::kHfacApply);
  if (!finite) {
    std::fprintf(stderr, "not finite: a partial sum was read that nobody wrote\n");
    return 3;
  }
  return 0;
}
