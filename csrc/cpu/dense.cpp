// Both optimizers where both moments are whole, in runs of elements. Phase 0 looks for what is not finite and, for
// H-Fac's clip, sums U^2; phase 1 steps. Without either there is one phase.
#include "../common/math/hfac.h"
#include "driver.h"

namespace hfac {
namespace {

template <class T, bool kHfac>
class DenseOp : public ItemsOp<T> {
  using Base = ItemsOp<T>;
  using Base::options_, Base::watch_, Base::item, Base::phases;

 public:
  DenseOp(std::vector<Item> items, const CpuOptions& options) : Base(std::move(items), options) {
    clips_.assign(this->items_.size(), T(1));
  }

  int phases() const override { return options_.nonfinite || options_.clip ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, kRun); }
  size_t workspace_bytes(int64_t i) const override {
    return options_.clip ? static_cast<size_t>(chunks(i, 0)) * sizeof(T) : 0;
  }
  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < this->items(); ++i) {
      reserve_rows(scratch, this->to(i), 1, std::min(kRun, item(i).rows), static_cast<bool>(watch_));
    }
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    const Route<T>& to = this->to(i);
    std::atomic<bool>& refused = this->refused(i);
    const int64_t first = c * kRun, count = std::min(kRun, it.rows - first);
    if (refused) return;
    const bool look = phase + 1 < phases();
    if (look && options_.nonfinite && nonfinite_range(to, it, first, count, scratch)) refused = true;
    if (refused || (look && !options_.clip)) return;
    DenseRun<T> run = operands(to, it, first, count, scratch);
    run.exp_avg = it.first_row ? static_cast<T*>(it.first_row) + first : nullptr;
    run.exp_avg_sq = static_cast<T*>(it.second_row) + first;
    const Scalars<T> s = scalars<T>(options_, it, clips_[static_cast<size_t>(i)]);
    if (look) {
      static_cast<T*>(workspace)[c] = to.pair->hfac_dense_norm(s, run);
      return;
    }
    Watched* const watched = this->watched(i, c);
    const T* old = watched ? old_weights<T>(run.param, count, scratch) : nullptr;
    (kHfac ? to.pair->hfac_dense : to.pair->smmf_dense)(s, run);
    if (watched) {
      watch_change(it.param, old, run.param, count, *watched);
      kHfac ? watch_hfac(run, *watched) : watch_smmf(s, run, old, *watched);
    }
    if (to.stage_param) scatter(it.param, first, count, static_cast<const T*>(run.param));
  }

  void finish(int64_t i, int phase, void* workspace) override {
    if (!this->tell(i, phase) || phase + 1 == phases() || !options_.clip) return;
    T total = 0;
    for (int64_t c = 0; c < chunks(i, 0); ++c) total += static_cast<const T*>(workspace)[c];
    const T rms = common::root(total / static_cast<T>(item(i).rows));
    clips_[static_cast<size_t>(i)] = T(1) / common::hfac_clip_divisor(rms, options_.clip_threshold);
  }

 private:
  std::vector<T> clips_;
};

template <class T>
using HfacDenseOp = DenseOp<T, true>;
template <class T>
using SmmfDenseOp = DenseOp<T, false>;

}  // namespace

size_t hfac_dense_step(std::vector<Item> items, const CpuOptions& options) {
  return run_both<HfacDenseOp>(std::move(items), options);
}
size_t smmf_dense_step(std::vector<Item> items, const CpuOptions& options) {
  return run_both<SmmfDenseOp>(std::move(items), options);
}

}  // namespace hfac
