// H-Fac on matrices: the sums of one read of the gradient, a fold of O(rows + columns), and the update with a second
// read. On shards of a matrix the sums are one op and the update another.
#include "../common/math/hfac.h"

#include <numeric>

#include "driver.h"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_clip_divisor;
using common::hfac_half_drift;
using common::root;

// Three sums per column and chunk: 1.2 % of the bytes of a parameter of kManyRows and more. With fewer rows the same
// share would leave too few chunks to divide among threads.
constexpr int64_t kManyRows = 1024;
int64_t chunk_rows(int64_t rows, int64_t cols, int64_t bytes) {
  const int64_t some = rows < kManyRows ? 64 : bytes == 2 ? 512 : 256;
  return std::max(some, ceil_div(ceil_div(kChunkElements, cols), kRowsAtOnce) * kRowsAtOnce);
}

// The chunks' sums, one after the other from `sums` on, added up in the first one's place.
template <class T>
void add_chunks(T* sums, int64_t chunks, int64_t cols) {
  for (int64_t c = 1; c < chunks; ++c) {
    const T* more = sums + c * 3 * padded(cols);
    for (int64_t j = 0; j < 3 * padded(cols); ++j) sums[j] += more[j];
  }
}

// Per row: the gradient's sum and the new second moment; where a step goes on from them, then what the update reads
// (HfacUpdate): what comes of the first moment, and the row's scale. Per column: sums of g, g^2 and g^2 / r_i; then
// likewise.
template <class T>
struct Sums {
  T *row_sum, *row_square, *col_sum, *col_square, *col_ratio;
};

template <class T>
Sums<T> sums_of(const Shard& s) {
  return {static_cast<T*>(s.row_sum), static_cast<T*>(s.row_square), static_cast<T*>(s.col_sum),
          static_cast<T*>(s.col_square), static_cast<T*>(s.col_ratio)};
}

template <class T>
Sums<T> sums_in(void* memory, const Item& it) {
  T *rows = static_cast<T*>(memory), *cols = rows + 2 * padded(it.rows);
  return {rows, rows + padded(it.rows), cols, cols + padded(it.cols), cols + 2 * padded(it.cols)};
}

// The first read of the gradient.
template <class T>
class HfacReader : public ItemsOp<T> {
 public:
  using ItemsOp<T>::ItemsOp;

  void reserve(Scratch& scratch) const override {
    ItemsOp<T>::reserve(scratch);
    for (int64_t i = 0; i < this->items(); ++i) columns(i).reserve(scratch);
  }

 protected:
  int64_t read_chunks(const Item& it) const { return ceil_div(it.rows, rows_of(it)); }

  // What chunk `c` gives: sums and new second moments of its rows, and in `cols`, where it is not null, three sums per
  // column. The item is refused where a square times the number of elements is not finite.
  void read(int64_t i, int64_t c, T* row_sum, T* row_square, T* cols, Scratch& scratch) {
    const Item& it = this->item(i);
    const Route<T>& to = this->to(i);
    const Columns<T> sums = columns(i);
    HfacStats<T> a{};
    a.grad_stride = a.cols = it.cols;
    a.beta2 = static_cast<T>(it.beta2);
    a.rest2 = static_cast<T>(1 - it.beta2);
    a.eps_sum = static_cast<T>(static_cast<double>(it.shard ? it.shard->cols : it.cols) * this->options_.eps);
    a.elements = static_cast<T>(it.rows * it.cols);
    a.ahead = fetch_ahead();
    const int64_t first = c * rows_of(it), end = std::min(first + rows_of(it), it.rows);
    const int64_t step = to.stage_grad ? staged_rows(it.cols, to.scattered) : end - first;
    for (int64_t r = first; r < end; r += step) {
      a.rows = std::min(step, end - r);
      a.grad = gradient(to, it, r * it.cols, a.rows * it.cols, scratch);
      if (cols && r == first) {
        a.col_sum = sums.beside(a.grad, cols, scratch);
        a.col_square = a.col_sum + sums.stride();
        a.col_ratio = a.col_square + sums.stride();
        std::fill_n(a.col_sum, 3 * sums.stride(), T(0));
      }
      a.row_square_old = static_cast<const T*>(it.second_row) + r;
      a.row_sum = row_sum ? row_sum + r : nullptr;
      a.row_square = row_square + r;
      to.grad->hfac_stats(a);
    }
    if (cols) sums.copy(a.col_sum, sums.stride(), cols, padded(it.cols));
    if (a.nonfinite && this->options_.nonfinite) this->refused(i) = true;
  }

 private:
  // Chunks of 64 rows are too short: to move the sums of each costs a Xeon 2 to 5 % of a step.
  Columns<T> columns(int64_t i) const {
    const Item& it = this->item(i);
    const int64_t size = this->to(i).stage_grad ? int64_t{sizeof(T)} : size_of(it.grad.dtype);
    return {3, it.cols, it.rows < kManyRows ? 0 : size};
  }
  static int64_t rows_of(const Item& it) {
    return chunk_rows(it.rows, it.cols, bytes_of(it.shard ? it.grad : it.param));
  }
};

// The statistics alone, of a shard or of a step in two calls.
template <class T>
class HfacSumsOp : public HfacReader<T> {
  using Base = HfacReader<T>;
  using Base::options_, Base::item;

 public:
  using Base::Base;

  int64_t chunks(int64_t i, int) const override { return this->read_chunks(item(i)); }
  size_t workspace_bytes(int64_t i) const override {
    return sums(i).col_sum ? static_cast<size_t>(chunks(i, 0) * 3 * padded(item(i).cols)) * sizeof(T) : 0;
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const Sums<T> to = sums(i);
    T* const cols = to.col_sum ? static_cast<T*>(workspace) + c * 3 * padded(item(i).cols) : nullptr;
    this->read(i, c, to.row_sum, to.row_square, cols, scratch);
  }

  void finish(int64_t i, int, void* workspace) override {
    const int64_t n = item(i).cols, index = item(i).index;
    const Sums<T> to = sums(i);
    if (options_.nonfinite) options_.nonfinite[index] = this->refused(i);
    if (!to.col_sum) return;
    T* from = static_cast<T*>(workspace);
    add_chunks(from, chunks(i, 0), n);
    if (options_.squares) options_.squares[index] = std::accumulate(from + padded(n), from + padded(n) + n, 0.0);
    for (T* const column : {to.col_sum, to.col_square, to.col_ratio}) {
      std::copy_n(from, n, column);
      from += padded(n);
    }
  }

 private:
  Sums<T> sums(int64_t i) const {
    return item(i).shard ? sums_of<T>(*item(i).shard) : sums_in<T>(item(i).kept, item(i));
  }
};

// Phase 0 sums and folds, or folds sums that are known (a shard's, or those that an earlier call kept); phase 1
// updates. `kCodes`: the first moment is whole, in 8 bits.
template <class T, bool kCodes>
class HfacOp : public HfacReader<T> {
  using Base = HfacReader<T>;
  using Base::options_, Base::watch_, Base::item, Base::watched;

 public:
  HfacOp(std::vector<Item> items, const CpuOptions& options) : Base(std::move(items), options) {
    if (kCodes) clips_.assign(this->items_.size(), T(1));
    for (size_t i = 0; i < this->items_.size(); ++i) {
      if (codes_apart(this->items_[i])) this->routes_[i].scattered = true;
    }
    for (int64_t i = 0; options.stage == HfacStage::kRest && options.nonfinite && i < this->items(); ++i) {
      this->refused(i) = options.nonfinite[item(i).index] != 0;
    }
  }

  int phases() const override { return 2; }
  int64_t chunks(int64_t i, int phase) const override {
    const Item& it = item(i);
    if (phase == 0) return known(it) ? 1 : this->read_chunks(it);
    return this->elements(i) == 0 ? 0 : ceil_div(it.rows, update_rows(it));
  }

  size_t workspace_bytes(int64_t i) const override {
    const Item& it = item(i);
    return it.kept ? 0 : static_cast<size_t>(2 * padded(it.rows) + chunks(i, 0) * 3 * padded(it.cols)) * sizeof(T);
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    const Sums<T> at = space(it, workspace);
    if (phase > 0) return update(i, c, at, scratch);
    if (known(it)) return;
    T* const row_sum = kCodes && !watch_ ? nullptr : at.row_sum;  // which nothing of the step but its report needs
    this->read(i, c, row_sum, at.row_square, at.col_sum + c * 3 * padded(it.cols), scratch);
  }

  void finish(int64_t i, int phase, void* workspace) override {
    if (!this->tell(i, phase) || phase > 0) return;
    const Item& it = item(i);
    const Sums<T> at = space(it, workspace);
    if (!it.shard) return fold(i, at);
    const Shard& all = *it.shard;
    const Sums<T> known = sums_of<T>(all);
    if constexpr (kCodes) {
      T* const s = static_cast<T*>(it.second_col);
      for (int64_t j = 0; j < it.cols; ++j) at.col_sum[j] = root(s[j]) / root(known.col_square[j]);
      std::copy_n(known.col_square, it.cols, s);
      std::copy_n(known.row_square, it.rows, at.row_square);
      step_units(it, at, static_cast<T>(all.old_total), static_cast<T>(all.total));
      clips_[static_cast<size_t>(i)] = divisor_of(all.mean_square);
    } else {
      step(it, at, known, all.rows, all.cols, all.total, all.mean_square);
    }
  }

  void reserve(Scratch& scratch) const override {
    Base::reserve(scratch);
    for (int64_t i = 0; i < this->items(); ++i) {
      if (this->elements(i) > 0) update_columns(i).reserve(scratch);
    }
    for (const Item& it : this->items_) {
      if (!codes_apart(it)) continue;
      scratch.reserve<int8_t>(Scratch::kCodes, std::min(it.rows, staged_rows(it.cols, true)) * it.cols);
    }
  }

 private:
  static const Strided* codes_apart(const Item& it) { return kCodes ? it.codes_strided : nullptr; }
  static bool known(const Item& it) { return it.shard || it.kept; }
  static Sums<T> space(const Item& it, void* workspace) { return sums_in<T>(it.kept ? it.kept : workspace, it); }
  static int64_t update_rows(const Item& it) {
    const int64_t some = std::clamp(it.rows * it.cols / 8, kChunkElements, kChunkElements * 4);
    return std::max<int64_t>(kRowsAtOnce, ceil_div(ceil_div(some, it.cols), kRowsAtOnce) * kRowsAtOnce);
  }

  // What `update` reads per column. Codes are updated one row at a time, which nothing is in the way of, and for a few
  // rows columns are not worth copying.
  Columns<T> update_columns(int64_t i) const {
    const Item& it = item(i);
    const int64_t size = this->to(i).stage_param ? int64_t{sizeof(T)} : size_of(it.param.dtype);
    return {2, it.cols, kCodes || std::min(it.rows, update_rows(it)) < 64 ? 0 : size};
  }

  void fold(int64_t i, Sums<T> at) {
    const Item& it = item(i);
    const int64_t m = it.rows, n = it.cols;
    const T beta2 = static_cast<T>(it.beta2), rest2 = static_cast<T>(1 - it.beta2);
    add_chunks(at.col_sum, chunks(i, 0), n);
    Watched* const watched = this->watched(i, 0);
    for (int64_t j = 0; watched && j < n; ++j) {
      watched->zero_cols += at.col_sum[j] == T(0) && at.col_square[j] == T(0);
    }

    // sum of U^2 = R sum_j w_j / s_j with w_j = sum_i g_ij^2 / r_i (see docs): in double, where no partial result can
    // overflow.
    const double total = std::accumulate(at.row_square, at.row_square + m, 0.0);
    double norm = 0;
    const T eps_sum = static_cast<T>(static_cast<double>(m) * options_.eps);
    T* s = static_cast<T*>(it.second_col);
    for (int64_t j = 0; j < n; ++j) {
      const T old = s[j];
      s[j] = hfac_average(beta2, old, rest2, at.col_square[j] + eps_sum);
      if (kCodes) at.col_sum[j] = root(old) / root(s[j]);
      norm += static_cast<double>(at.col_ratio[j]) / static_cast<double>(s[j]);
    }
    const double mean_square = total * norm / (static_cast<double>(m) * static_cast<double>(n));
    if (watched) watched->direction = total * norm;
    if constexpr (kCodes) {
      const T* const r = static_cast<const T*>(it.second_row);
      step_units(it, at, static_cast<T>(std::accumulate(r, r + m, 0.0)), static_cast<T>(total));
      clips_[static_cast<size_t>(i)] = divisor_of(mean_square);
    } else {
      step(it, at, {at.row_sum, at.row_square, at.col_sum, s, nullptr}, m, n, total, mean_square);
    }
  }

  T divisor_of(double mean_square) const {
    return options_.clip ? hfac_clip_divisor(root(static_cast<T>(mean_square)), options_.clip_threshold) : T(1);
  }

  // The second moment's step, whose columns have made theirs, and of each row and column the change of the unit and the
  // scale.
  void step_units(const Item& it, Sums<T> at, T total_old, T total) const {
    const Scalars<T> s = scalars<T>(options_, it);
    const T* const col_square = static_cast<const T*>(it.second_col);
    for (int64_t j = 0; j < it.cols; ++j) at.col_square[j] = T(1) / root(col_square[j]);
    T* const row_square = static_cast<T*>(it.second_row);
    const T scale = (s.negate ? -s.rest1 : s.rest1) * root(total), growth = root(total) / root(total_old);
    for (int64_t k = 0; k < it.rows; ++k) {
      const T fresh = at.row_square[k];
      at.row_sum[k] = total_old == T(0) ? T(0) : s.beta1 * (root(row_square[k]) / root(fresh) * growth);
      at.row_square[k] = scale * (T(1) / root(fresh));
      row_square[k] = fresh;
    }
  }

  // Every moment's step, and of each row and column what `update` reads, to `to`, where the sums may lie.
  void step(const Item& it, Sums<T> to, Sums<T> known, int64_t rows, int64_t cols, double total,
            double mean_square) const {
    const Scalars<T> s = scalars<T>(options_, it);
    const T divisor = divisor_of(mean_square);
    step_side(s, it.cols, known.col_sum, known.col_square, rows, it.first_col, it.second_col, to.col_sum);
    const T* square = static_cast<const T*>(it.second_col);
    for (int64_t j = 0; j < it.cols; ++j) to.col_square[j] = T(1) / root(square[j]);

    step_side(s, it.rows, known.row_sum, known.row_square, cols, it.first_row, it.second_row, to.row_sum);
    square = static_cast<const T*>(it.second_row);
    const T scale = root(static_cast<T>(total)), step = s.negate ? -s.lr : s.lr;
    for (int64_t k = 0; k < it.rows; ++k) to.row_square[k] = step * (scale * (T(1) / root(square[k])) / divisor);
  }

  // The moments of one side, each entry of which stands for `length` elements, and lr times half of its drift.
  static void step_side(Scalars<T> s, int64_t count, const T* sum, const T* fresh, int64_t length, void* first,
                        void* second, T* half_drift) {
    const T sign = s.negate ? T(-1) : T(1), elements = static_cast<T>(length);
    T *average = static_cast<T*>(first), *square = static_cast<T*>(second);
    if (fresh != square) std::copy_n(fresh, count, square);
#pragma GCC ivdep  // what lies in one place is one entry's
    for (int64_t k = 0; k < count; ++k) {
      const T mean = sign * sum[k] / elements;
      average[k] = hfac_average(s.beta1, average[k], s.rest1, mean);
      half_drift[k] = s.lr * hfac_half_drift(s.beta1, average[k], mean, square[k], elements);
    }
  }

  void update(int64_t i, int64_t c, Sums<T> at, Scratch& scratch) {
    if (this->refused(i)) return;
    const Item& it = item(i);
    const Route<T>& to = this->to(i);
    const Columns<T> columns = update_columns(i);
    Watched* const watched = this->watched(i, c);
    const int64_t first = c * update_rows(it), end = std::min(first + update_rows(it), it.rows);
    HfacUpdate<T> a{};
    a.grad_stride = a.param_stride = a.cols = it.cols;
    a.ahead = fetch_ahead();
    a.decay = static_cast<T>(options_.lr * options_.weight_decay);
    if (kCodes) {
      const Scalars<T> s = scalars<T>(options_, it);
      a.beta1 = s.beta1;
      a.step = s.lr * (T(1) / clips_[static_cast<size_t>(i)]);
    }
    const Strided* const apart = codes_apart(it);
    const bool staged = to.stage_param || to.stage_grad || apart;
    const int64_t step = staged ? staged_rows(it.cols, to.scattered) : end - first;
    for (int64_t r = first; r < end; r += step) {
      a.rows = std::min(step, end - r);
      const DenseRun<T> run = operands(to, it, r * it.cols, a.rows * it.cols, scratch);
      a.grad = run.grad;
      a.param = run.param;
      if (r == first) {
        T* const cols = columns.beside(run.param, at.col_sum, scratch);
        columns.copy(at.col_sum, padded(it.cols), cols, columns.stride());
        a.col_first = cols;
        a.col_scale = cols + columns.stride();
      }
      a.row_first = at.row_sum + r;
      a.row_scale = at.row_square + r;
      int8_t* const codes = static_cast<int8_t*>(it.codes);
      a.codes = kCodes ? codes + r * it.cols : nullptr;
      if (apart) {
        a.codes = scratch.at<int8_t>(Scratch::kCodes, run.count);
        gather(codes, *apart, r * it.cols, run.count, a.codes);
      }
      const T* old = watched ? old_weights<T>(run.param, run.count, scratch) : nullptr;
      (kCodes ? to.pair->hfac_int8 : to.pair->hfac_update)(a);
      if (watched) {
        watch_change(it.param, old, run.param, run.count, *watched);
        watch_rows(static_cast<const T*>(run.grad), a.rows, it.cols, *watched);
      }
      if (to.stage_param) scatter(it.param, r * it.cols, run.count, static_cast<const T*>(run.param));
      if (apart) scatter(codes, *apart, r * it.cols, run.count, a.codes);
    }
  }

  std::vector<T> clips_;  // by item, what the direction is divided by, where the whole of it is clipped
};

template <class T>
using FactoredOp = HfacOp<T, false>;
template <class T>
using CodesOp = HfacOp<T, true>;

}  // namespace

size_t hfac_kept_bytes(int64_t rows, int64_t cols, bool wide) {
  return static_cast<size_t>(2 * padded(rows) + 3 * padded(cols)) * (wide ? sizeof(double) : sizeof(float));
}

size_t hfac_step(std::vector<Item> items, const CpuOptions& options) {
  return options.stage == HfacStage::kStatistics ? run_both<HfacSumsOp>(std::move(items), options)
                                                 : run_both<FactoredOp>(std::move(items), options);
}
size_t hfac_int8_step(std::vector<Item> items, const CpuOptions& options) {
  return options.stage == HfacStage::kStatistics ? run_both<HfacSumsOp>(std::move(items), options)
                                                 : run_both<CodesOp>(std::move(items), options);
}
size_t hfac_sums(std::vector<Item> items, const CpuOptions& options) {
  return run_both<HfacSumsOp>(std::move(items), options);
}

}  // namespace hfac
