// H-Fac of a matrix that one block holds: a whole step in one launch, from one read of the gradient. Sums are added in
// the order of hfac_stats.cu, hfac.cu and hfac_update.cuh, whose bits these are.
#include "hfac_element.cuh"
#include "hfac_moments.cuh"

namespace hfac {
namespace {

// Blocks of a multiprocessor at a time. A fourth would leave too few registers for vectors of 32 bits, and by the
// compiler's choices for sm_100 for those of 16; a third too few for what is watched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSmallMost = 3;
#else
constexpr int kSmallMost = 4;
#endif
template <class A, bool kWatched>
constexpr int kSmallBlocks = kWatched                                                                   ? 2
                             : sizeof(typename A::Grad) + sizeof(typename A::Param) > 2 * sizeof(Chunk) ? 3
                                                                                                        : kSmallMost;

// A thread has a vector of one row in kSmallRows; `lanes` threads of one warp share a row.
template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, kSmallBlocks<A, kWatched>) hfac_small(Arguments a) {
  using T = typename A::T;
  constexpr int kValues = 2 * kSmallRows, kCols = kWarp * kVector;
  alignas(16) __shared__ T meet[kSums][kTileThreads * kVector];
  alignas(16) __shared__ T col_first[kCols], col_scale[kCols];
  __shared__ double shared[2 * kTileWarps];
  if (skipped(a)) return;
  const DeviceItem& it = a.items[tile_of(a).item];
  const int lanes = it.tiling.lanes, shift = log2_of(lanes), ys = kTileThreads >> shift;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int x = thread & (lanes - 1), y = thread >> shift;
  const int rows = static_cast<int>(it.rows), cols = static_cast<int>(it.cols), col = x * kVector;

  typename A::Grad g_raw[kSmallRows]{};
  typename A::Param w_raw[kSmallRows]{};
  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  HFAC_UNROLLED (r, kSmallRows) {
    const int row = r * ys + y;
    if (row >= rows || col >= cols) continue;
    g_raw[r] = A::grad(grad, a.layouts, row * cols + col, kVector, true);
    w_raw[r] = A::param(param, a.layouts, row * cols + col, kVector);
  }
  // Of the thread's rows the one whose sum this lane has, or of odd lanes its sum of squares; and of all columns one.
  const bool odd = lane % 2;
  const int my_row = lane % kValues / 2 * ys + y;
  T *const row_first = static_cast<T*>(it.first_row), *const row_second = static_cast<T*>(it.second_row);
  T *const first_col = static_cast<T*>(it.first_col), *const second_col = static_cast<T*>(it.second_col);
  const T first_before = my_row < rows ? row_first[my_row] : T(0), r_before = my_row < rows ? row_second[my_row] : T(0);
  const T v_before = thread < cols ? first_col[thread] : T(0), s_before = thread < cols ? second_col[thread] : T(0);

  const Gradient<T> gradient(a);
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
    if (block_sum(bad ? 1.0 : 0.0, shared) > 0) {
      if (thread == 0) a.nonfinite[it.index] = 1;
      return;
    }
  }
  const T total = sum_values(values, lanes), other = shuffle_xor(total, 1);
  const T r_new = hfac_average(b2.beta, r_before, b2.rest,
                               (odd ? total : other) + static_cast<T>(static_cast<double>(it.cols) * a.options.eps));
  const T inverse = my_row < rows ? T(1) / r_new : T(0);
  double totals[2] = {0, 0};  // sums of r and of w_j / s_j
  double zeros[2] = {0, 0};
  T half_phi = T(0);
  if (my_row < rows && x < kValues) {
    if (odd) {
      totals[0] = static_cast<double>(r_new);
    } else {
      zeros[0] = total == T(0) && other == T(0) ? 1 : 0;
      half_phi = step_moments(row_first, row_second, my_row, first_before, sign * total / cols_t, r_new, cols_t, b1);
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
    store_raw(&meet[j][thread * kVector], raw);
  }
  __syncthreads();
  if (thread < cols) {
    T of_col[kSums];
    HFAC_UNROLLED (j, kSums) of_col[j] = T(0);
    for (int from = 0; from < ys; ++from) {
      HFAC_UNROLLED (j, kSums) of_col[j] = of_col[j] + meet[j][from * lanes * kVector + thread];
    }
    const T s = hfac_average(b2.beta, s_before, b2.rest,
                             of_col[1] + static_cast<T>(static_cast<double>(it.rows) * a.options.eps));
    col_first[thread] = step_moments(first_col, second_col, thread, v_before, sign * of_col[0] / rows_t, s, rows_t, b1);
    col_scale[thread] = T(1) / root(s);
    totals[1] = static_cast<double>(of_col[2]) / static_cast<double>(s);
    zeros[1] = of_col[0] == T(0) && of_col[1] == T(0) ? 1 : 0;
  }
  block_sums(totals, shared);
  const double norm = totals[0] * totals[1];
  const T scale = root(static_cast<T>(totals[0]));
  const T divisor =
      clip_divisor(a.options, static_cast<T>(norm / (static_cast<double>(rows) * static_cast<double>(cols))));
  if constexpr (kWatched) {
    block_sums(zeros, shared);
    double* const watched = a.watched + int64_t{it.index} * kWatchedNumbers;
    if (thread == 0) {
      watched[kDirection] += norm;
      HFAC_UNROLLED (j, 2) watched[kZeroRows + j] += zeros[j];
    }
  }

  const T lr = static_cast<T>(value_of(a.scalars.lr, 0));
  const T weight_decay = static_cast<T>(value_of(a.scalars.weight_decay, 0));
  const T row_scale = scale * (T(1) / root(r_new)) / divisor;
  T firsts[kVector], scales[kVector];
  if (col < cols) {
    unpack(load_raw(col_first + col, false), firsts);
    unpack(load_raw(col_scale + col, false), scales);
  }
  Watch<A> watch;
  HFAC_UNROLLED (r, kSmallRows) {
    const T first_of = of_row(half_phi, r), scale_of = of_row(row_scale, r);
    const int row = r * ys + y;
    if (row >= rows || col >= cols) continue;
    T w[kVector];
    A::widen(w_raw[r], w);
    [[maybe_unused]] T old[kVector];
    HFAC_UNROLLED (k, kVector) {
      old[k] = w[k];
      const T step = gradient.negate ? -g[r][k] : g[r][k];
      w[k] = updated(w[k], step, first_of, firsts[k], scales[k], scale_of, lr, weight_decay, A::rough(param));
    }
    if constexpr (kWatched) watch.add(param, old, w, kVector);
    A::store(param, a.layouts, row * cols + col, kVector, w);
  }
  if constexpr (kWatched) watch.finish(a, it);
}

}  // namespace

KernelFunction hfac_small_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, NearestAccesses, hfac_small);
}

}  // namespace hfac
