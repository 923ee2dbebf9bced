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

class Arena {
 public:
  float* floats(int64_t count, float scale) {
    auto* p = reinterpret_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float), 0));
    for (int64_t k = 0; k < count; ++k) p[k] = scale * std::sin(static_cast<float>(k + 1));
    moments_.push_back({p, count});
    return p;
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

bool run(OpKind op, const std::vector<Matrix>& matrices) {
  Arena arena;
  std::vector<BoundItem> items;
  std::vector<BoundGrad> grads;
  const bool dense = op == OpKind::kHfacDense || op == OpKind::kSmmfDense;
  for (const Matrix& m : matrices) {
    const int64_t count = m.rows * m.cols;
    BoundItem item{};
    item.index = static_cast<int64_t>(items.size());
    item.param = {arena.floats(count, 1.0f), DType::kFloat32, nullptr};
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
  hfac::Step step(items, static_cast<int64_t>(items.size()), hfac::PlanOptions{op});
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
    step.launch({table, workspace, counters}, s, flagged ? flags : nullptr, nullptr, nullptr, 0, nullptr);
  }
  return arena.finite();
}

}  // namespace

int main(int argc, char** argv) {
  hfac::emulation::set_threading(argc > 1 ? argv[1] : "threads");
  const std::vector<Matrix> matrices = {{24, 16, 1}, {19, 17, 19}, {12, 12, 4}, {40, 264, 1}, {9, 8, 72}};
  const bool finite = run(OpKind::kSmmf, matrices) & run(OpKind::kHfac, matrices) &
                      run(OpKind::kSmmfDense, {{24, 1, 1}, {8200, 1, 1}}) &
                      run(OpKind::kHfacDense, {{24, 1, 1}, {8200, 1, 1}});
  if (!finite) {
    std::fprintf(stderr, "not finite: a partial sum was read that nobody wrote\n");
    return 3;
  }
  return 0;
}
