// H-Fac of a matrix that one block holds: a whole step in one launch, from one read of the gradient. Sums are added in
// the order of hfac_stats.cu, hfac.cu and hfac_update.cuh, whose bits these are; of both forms of the first moment.
#include <type_traits>

#include "codes.cuh"
#include "copies.cuh"
#include "hfac_element.cuh"
#include "hfac_moments.cuh"

namespace hfac {
namespace {

// Are gradient and parameter wider than 16 bits?
template <class A>
constexpr bool kWideVectors = sizeof(typename A::Grad) + sizeof(typename A::Param) > 2 * sizeof(Chunk);
// Of the rows of a thread so many have their parameters in shared memory until they are updated, so that a fourth block
// has registers for wide vectors.
template <class A, bool kWatched, bool kCodes>
constexpr int kHeldRows = !kWatched && !kCodes && !kMoreRegisters && kWideVectors<A> ? 1 : 0;
// Blocks of a multiprocessor at a time. A fourth would leave too few registers for codes beside wide vectors, and by
// the compiler's choices for sm_100 for any; a third too few for what is watched.
template <class A, bool kWatched, bool kCodes>
constexpr int kSmallBlocks = kWatched                                                                 ? 2
                             : kMoreRegisters || (kWideVectors<A> && !kHeldRows<A, kWatched, kCodes>) ? 3
                                                                                                      : 4;

constexpr int kSmallCols = kWarp * kVector;
// Warps share out what is done once for a matrix, so that none of a multiprocessor's schedulers has most of it: six add
// up columns while the others finish rows, the second and those behind it finish columns, the first adds up the totals.
constexpr int kAdders = 6 * kWarp, kColThreads = kWarp;
constexpr int kSmallMostRows = kSmallRows * kTileThreads / 8;
static_assert(kAdders + kSmallMostRows <= kTileThreads, "a thread for each row");

// What the threads of a block tell each other.
template <class T>
struct SmallShared {
  alignas(16) T meet[kSums][kTileThreads * kVector];  // sums of each thread's rows
  T col_sums[kSums * kSmallCols];
  alignas(16) T col_first[kSmallCols];
  alignas(16) T col_scale[kSmallCols];
  double col_share[kSmallCols];                      // w_j / s_j
  T row_sum[kSmallMostRows], row_r[kSmallMostRows];  // of the gradient; the new r
  T row_before[kSmallMostRows];                      // of codes r as it was
  T row_first[kSmallMostRows], row_scale[kSmallMostRows];
  T scale, divisor, growth;  // as in HfacSpace
  double sums[2 * kTileWarps];
};
template <class T>
struct SmallCodesShared : SmallShared<T> {
  CodeTable<T> table;
};

// Sums of columns over the threads that have them, in the order of rows; `kLanes` of these share a row.
template <int kLanes, class T>
HFAC_DEVICE void add_columns(SmallShared<T>& shared) {
  constexpr int kWidth = kLanes * kVector, kRowsOfThreads = kTileThreads / kLanes;
  for (int k = static_cast<int>(threadIdx.x); k < kSums * kWidth; k += kAdders) {
    const T* const from = shared.meet[k / kWidth] + k % kWidth;
    T sum = T(0);
    HFAC_UNROLLED (y, kRowsOfThreads) sum = sum + from[y * kWidth];
    shared.col_sums[k] = sum;
  }
}

// A thread has a vector of one row in kSmallRows; `lanes` threads of one warp share a row.
template <class A, bool kWatched, bool kCodes>
HFAC_DEVICE void step_small(const Arguments& a) {
  using T = typename A::T;
  constexpr int kValues = 2 * kSmallRows;
  __shared__ std::conditional_t<kCodes, SmallCodesShared<T>, SmallShared<T>> shared;
  constexpr int kHeld = kHeldRows<A, kWatched, kCodes>, kChunks = sizeof(typename A::Param) / sizeof(Chunk);
  [[maybe_unused]] __shared__ Chunk held[kHeld ? kHeld : 1][kHeld ? kChunks : 1][kHeld ? kTileThreads : 1];
  if (skipped(a)) return;
  const DeviceItem& it = a.items[forward_tile(a).item];
  const int lanes = it.tiling.lanes, shift = log2_of(lanes), ys = kTileThreads >> shift;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int x = thread & (lanes - 1), y = thread >> shift;
  const int rows = static_cast<int>(it.rows), cols = static_cast<int>(it.cols), col = x * kVector;

  typename A::Grad g_raw[kSmallRows]{};
  typename A::Param w_raw[kSmallRows]{};
  [[maybe_unused]] Codes codes[kSmallRows]{};
  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  [[maybe_unused]] const CodesAt<A> codes_at(a, it);
  HFAC_UNROLLED (r, kSmallRows) {
    const int row = r * ys + y;
    if (row >= rows || col >= cols) continue;
    g_raw[r] = A::grad(grad, a.layouts, row * cols + col, kVector, true);
    if (r < kHeld) {
      const char* const from = static_cast<const char*>(param.data) + (row * cols + col) * (kChunks * 2);
      HFAC_UNROLLED (c, kChunks) begin_copy(&held[r][c][thread], global(from) + 16 * c, true);
    } else {
      w_raw[r] = A::param(param, a.layouts, row * cols + col, kVector);
    }
    if constexpr (kCodes) codes[r] = codes_at.load(row * cols + col, kVector);
  }
  if constexpr (kHeld > 0) commit_copies();
  // Of the thread's rows the one whose sum this lane has, or of odd lanes its sum of squares; and what it finishes: a
  // row, and a column.
  const bool odd = lane % 2;
  const int my_row = lane % kValues / 2 * ys + y;
  const int end_row = thread - kAdders, end_col = (thread - kColThreads) & (kTileThreads - 1);
  const bool has_row = my_row < rows, ends_row = 0 <= end_row && end_row < rows, ends_col = end_col < cols;
  const auto of = [](void* const& moments) { return global(static_cast<const T*>(moments)); };
  const T r_before = has_row ? of(it.second_row)[my_row] : T(0);
  const T s_before = ends_col ? of(it.second_col)[end_col] : T(0);
  const T row_before = ends_row ? of(kCodes ? it.second_row : it.first_row)[end_row] : T(0);
  [[maybe_unused]] const T v_before = !kCodes && ends_col ? of(it.first_col)[end_col] : T(0);
  // Where registers are few addresses are loaded anew when moments are stored, so that none has them until then.
  const auto anew = [](void* const& moments) {
    return kCodes || kMoreRegisters ? global(load_fresh(&moments)) : global(moments);
  };

  const LeanGradient<T> gradient(a);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const T rows_t = static_cast<T>(rows), cols_t = static_cast<T>(cols), sign = a.options.maximize ? T(-1) : T(1);
  bool bad = false;
  T g[kSmallRows][kVector], values[kValues];
  HFAC_UNROLLED (r, kSmallRows) {
    A::widen(g_raw[r], g[r]);
    gradient.unscale(g[r]);
    T sum = T(0), square = T(0);
    HFAC_UNROLLED (k, kVector) {
      sum = sum + g[r][k];
      square = fused(g[r][k], g[r][k], square);
    }
    values[2 * r] = sum;
    values[2 * r + 1] = square;
    if (a.nonfinite) bad = bad || nonfinite(g[r], static_cast<T>(it.rows * it.cols));
  }
  if (a.nonfinite) {
    if (block_sum(bad ? 1.0 : 0.0, shared.sums) > 0) {
      if (thread == 0) a.nonfinite[it.index] = 1;
      return;
    }
  }
  if constexpr (kCodes) make_table(shared.table);
  const T total = sum_values(values, lanes), other = shuffle_xor(total, 1);
  const T r_new = hfac_average(b2.beta, r_before, b2.rest,
                               (odd ? total : other) + static_cast<T>(static_cast<double>(it.cols) * a.options.eps));
  T inverse = T(0);
  if constexpr (kCodes && !kWideVectors<A>) {
    inverse = has_row ? T(1) / r_new : T(0);
  } else {
    const T quotient = reciprocal(r_new);
    inverse = has_row ? quotient : T(0);
  }
  if (has_row && x < kValues) {
    if (odd) {
      shared.row_r[my_row] = r_new;
    } else {
      shared.row_sum[my_row] = total;
    }
  }
  const auto of_row = [&](T value, int r) { return shuffle(value, (lane & -lanes) + 2 * r); };

  T sums[kSums][kVector];
  HFAC_UNROLLED (k, kSums * kVector) sums[k / kVector][k % kVector] = T(0);
  HFAC_UNROLLED (r, kSmallRows) {
    const T by = of_row(inverse, r);
    HFAC_UNROLLED (k, kVector) {
      const T square = g[r][k] * g[r][k];
      sums[0][k] = sums[0][k] + g[r][k];
      sums[1][k] = sums[1][k] + square;
      sums[2][k] = fused(square, by, sums[2][k]);
    }
  }
  HFAC_UNROLLED (j, kSums) {
    Raw<T> raw;
    pack(sums[j], raw);
    store_raw(&shared.meet[j][thread * kVector], raw);
  }
  __syncthreads();
  if (thread < kAdders) {
    if (lanes == 8) {
      add_columns<8>(shared);
    } else if (lanes == 16) {
      add_columns<16>(shared);
    } else {
      add_columns<32>(shared);
    }
  } else if (ends_row) {
    const T r = shared.row_r[end_row];
    if constexpr (kCodes) {
      shared.row_before[end_row] = row_before;
      shared.row_first[end_row] = step_unit(anew(it.second_row), end_row, row_before, r);
    } else {
      const T mean = sign * shared.row_sum[end_row] / cols_t;
      shared.row_first[end_row] =
          step_moments(anew(it.first_row), anew(it.second_row), end_row, row_before, mean, r, cols_t, b1);
    }
    shared.row_scale[end_row] = T(1) / root(r);
  }
  __syncthreads();
  double zeros[2] = {0, 0};
  if (ends_col) {
    T of_col[kSums];
    HFAC_UNROLLED (j, kSums) of_col[j] = shared.col_sums[j * lanes * kVector + end_col];
    const T s = hfac_average(b2.beta, s_before, b2.rest,
                             of_col[1] + static_cast<T>(static_cast<double>(it.rows) * a.options.eps));
    if constexpr (kCodes) {
      shared.col_first[end_col] = step_unit(anew(it.second_col), end_col, s_before, s);
    } else {
      const T mean = sign * of_col[0] / rows_t;
      shared.col_first[end_col] =
          step_moments(anew(it.first_col), anew(it.second_col), end_col, v_before, mean, s, rows_t, b1);
    }
    shared.col_scale[end_col] = T(1) / root(s);
    shared.col_share[end_col] = static_cast<double>(of_col[2]) / static_cast<double>(s);
    zeros[1] = of_col[0] == T(0) && of_col[1] == T(0) ? 1 : 0;
  }
  __syncthreads();
  if (thread < kWarp) {                  // one warp finds out what all want to know
    double totals[kCodes ? 3 : 2] = {};  // sums of r, of w_j / s_j, of codes of r as it was
    for (int k = lane; k < rows; k += kWarp) {
      totals[0] += static_cast<double>(shared.row_r[k]);
      if constexpr (kCodes) totals[2] += static_cast<double>(shared.row_before[k]);
    }
    for (int k = lane; k < cols; k += kWarp) totals[1] += shared.col_share[k];
    warp_sums(totals);
    const double norm = totals[0] * totals[1];
    const T mean_square = static_cast<T>(norm / (static_cast<double>(rows) * static_cast<double>(cols)));
    const T scale = root(static_cast<T>(totals[0])), divisor = clip_divisor(a.options, mean_square);
    if (lane == 0) {
      shared.scale = scale;
      shared.divisor = divisor;
      if constexpr (kCodes) shared.growth = totals[2] == 0 ? T(0) : scale / root(static_cast<T>(totals[2]));
      if constexpr (kWatched) a.watched[int64_t{it.index} * kWatchedNumbers + kDirection] += norm;
    }
  }
  __syncthreads();
  if constexpr (kWatched) {
    if (has_row && x < kValues && !odd) zeros[0] = total == T(0) && other == T(0) ? 1 : 0;
    block_sums(zeros, shared.sums);
    double* const watched = a.watched + int64_t{it.index} * kWatchedNumbers;
    if (thread == 0) {
      HFAC_UNROLLED (j, 2) watched[kZeroRows + j] += zeros[j];
    }
  }

  const T lr = static_cast<T>(value_of(a.scalars.lr, 0));
  const T weight_decay = static_cast<T>(value_of(a.scalars.weight_decay, 0));
  const T scale = shared.scale, divisor = shared.divisor;
  T of_mine = has_row ? shared.row_first[my_row] : T(0), row_scale = has_row ? shared.row_scale[my_row] : T(0);
  if constexpr (kCodes) {
    const T growth = shared.growth;
    of_mine = growth == T(0) ? T(0) : b1.beta * (of_mine * growth);
    row_scale = (a.options.maximize ? -b1.rest : b1.rest) * scale * row_scale;
  } else {
    row_scale = scale * row_scale / divisor;
  }
  [[maybe_unused]] const T step = lr * (T(1) / divisor), decay = lr * weight_decay;
  T firsts[kVector], scales[kVector];
  if (col < cols) {
    unpack(load_raw(shared.col_first + col, false), firsts);
    unpack(load_raw(shared.col_scale + col, false), scales);
  }
  [[maybe_unused]] const Constants<T, kCodes> constants(shared);
  Watch<A> watch;
  if constexpr (kHeld > 0) wait_for_copies<0>();
  HFAC_UNROLLED (r, kSmallRows) {
    const T first_of = of_row(of_mine, r), scale_of = of_row(row_scale, r);
    const int row = r * ys + y;
    if (row >= rows || col >= cols) continue;
    T w[kVector];
    if constexpr (!kMoreRegisters && sizeof(typename A::Grad) == sizeof(Chunk)) {
      A::widen(g_raw[r], g[r]);
      gradient.unscale(g[r]);
    }
    if (r < kHeld) {
      HFAC_UNROLLED (c, kChunks) w_raw[r].chunk[c] = load_chunk(&held[r][c][thread], false);
    }
    A::widen(w_raw[r], w);
    [[maybe_unused]] T old[kVector];
    HFAC_UNROLLED (k, kVector) old[k] = w[k];
    if constexpr (kCodes) {
      T moment[kVector];
      Codes fresh = biased(codes[r]);
      HFAC_UNROLLED (k, kVector) g[r][k] = g[r][k] * scales[k] * scale_of;
      step_codes(fresh, shared.table, first_of, firsts, g[r], constants, A::rough(param), moment);
      HFAC_UNROLLED (k, kVector) {
        w[k] = updated_by_moment(w[k], moment[k], g[r][k], b1.beta, step, decay, A::rough(param));
      }
      codes_at.store(row * cols + col, kVector, biased(fresh));
    } else {
      HFAC_UNROLLED (k, kVector) {
        const T mine = gradient.negate ? -g[r][k] : g[r][k];
        w[k] = updated(w[k], mine, first_of, firsts[k], scales[k], scale_of, lr, weight_decay, A::rough(param));
      }
    }
    if constexpr (kWatched) watch.add(param, old, w, kVector);
    A::store(param, a.layouts, row * cols + col, kVector, w);
  }
  if constexpr (kWatched) watch.finish(a, it);
}

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, kSmallBlocks<A, kWatched, false>) hfac_small(Arguments a) {
  step_small<A, kWatched, false>(a);
}
template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, kSmallBlocks<A, kWatched, true>) hfac_int8_small(Arguments a) {
  step_small<A, kWatched, true>(a);
}

}  // namespace

KernelFunction hfac_small_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, NearestAccesses, hfac_small);
}
KernelFunction hfac_int8_small_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, NearestAccesses, hfac_int8_small);
}

}  // namespace hfac
