// H-Fac's statistics: sums of rows and columns from one read of the gradient.
//
// They hold whole rows, because r_i is needed for the third column sum, that of g^2 / r_i, which gives the clip norm
// without a third read:
//     sum_ij U_ij^2 = R sum_j w_j / s_j,  w_j = sum_i g_ij^2 / r_i,  R = sum_i r_i.
#include "../common/math/hfac.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::hfac_average;

// 16 bytes to shared memory, while the thread goes on; zeros, and nothing is read, unless they are `there`.
HFAC_DEVICE void begin_copy(Chunk* to, const char* from, bool there) {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
#else
  emulation::begin_copy(to, from, sizeof(Chunk), there ? sizeof(Chunk) : 0);
#endif
}
HFAC_DEVICE void commit_copies() {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}
// Until no more than kLeft of the groups that the thread has committed are under way.
template <int kLeft>
HFAC_DEVICE void wait_for_copies() {
#ifdef HFAC_DEVICE_COMPILER
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulation::wait_for_copies(kLeft);
#endif
}

// What all rows of a block have in common: beta2 and its rest, eps of a whole row, what gradients are divided by, and
// of the parameter's elements how many; where the tile's gradient, moments and sums of rows begin, and its rows.
template <class T>
struct StatsNumbers {
  T beta, rest, eps, scale, elements;
  const void* data;
  const T* moments;
  T *fresh, *fresh_square;
  int rows, cols;
};

// A block's rows. `kOptions`: gradients may be scaled, and those that are not finite looked for; the plain kernel has
// no instruction for either. `kLean`: the numbers are in shared memory and loaded for every use, where the columns'
// sums leave no registers for them.
template <class A, bool kOptions, bool kLean = false>
struct Stats {
  using T = typename A::T;
  using Grad = typename A::Grad;
  const Arguments& a;
  const DeviceItem& it;
  const Operand grad = it.grad;
  const int64_t first_row;
  const int tile_rows;
  const StatsNumbers<T>* shared = nullptr;
  StatsNumbers<T> own{};
  bool bad = false;

  HFAC_DEVICE Stats(const Arguments& arguments, const Tile& tile)
      : a(arguments),
        it(arguments.items[tile.item]),
        first_row(static_cast<int64_t>(tile.index) * it.tiling.rows),
        tile_rows(static_cast<int>(it.rows - first_row < it.tiling.rows ? it.rows - first_row : it.tiling.rows)) {}

  // By all threads: they go on together where the numbers are shared.
  HFAC_DEVICE void begin(StatsNumbers<T>& memory) {
    if (!kLean || threadIdx.x == 0) {
      const Decay<T> b2(a.scalars.beta2, it.index);
      const int64_t row = a.shards ? a.shards[&it - a.items].cols : it.cols;
      own.beta = b2.beta;
      own.rest = b2.rest;
      own.eps = static_cast<T>(static_cast<double>(row) * a.options.eps);
      own.scale = kOptions && a.grad_scale ? static_cast<T>(*a.grad_scale) : T(1);
      own.elements = static_cast<T>(it.rows * it.cols);
      own.rows = tile_rows;
      own.cols = static_cast<int>(it.cols);
      own.data =
          static_cast<const char*>(grad.data) + first_row * it.cols * static_cast<int64_t>(sizeof(Grad) / kVector);
      own.moments = moments_before();
      own.fresh = of_rows(false);
      own.fresh_square = of_rows(true);
      if constexpr (kLean) memory = own;
    }
    if constexpr (kLean) {
      __syncthreads();
      shared = &memory;
    }
  }
  template <class N>
  HFAC_DEVICE N get(N StatsNumbers<T>::* which) const {
    if constexpr (kLean) return load_fresh(&(shared->*which));
    return own.*which;
  }
  HFAC_DEVICE int rows() const { return get(&StatsNumbers<T>::rows); }

  // Where the tile's sums go, those of its columns and of its rows; `odd`: r in place of the sum.
  HFAC_DEVICE T* of_columns() const {
    return HfacSpace<T>(it, a.workspace).cols + static_cast<int64_t>(tile_of(a).index) * kSums * it.cols;
  }
  HFAC_DEVICE T* of_rows(bool odd) const {
    const HfacSpace<T> space(it, a.workspace);
    return (odd ? space.row_square : space.row_sum) + first_row;
  }
  HFAC_DEVICE const T* moments_before() const { return global(static_cast<const T*>(it.second_row)) + first_row; }

  HFAC_DEVICE Grad load(int row, int64_t col, int count) const {
    return A::grad(grad, a.layouts, (first_row + row) * it.cols + col, count, false);
  }

  // One by one, right before each is used: eight quotients at a time would take eight registers. The sign of a
  // maximized gradient is left to the fold.
  HFAC_DEVICE T unscaled(T g) const {
    if constexpr (kOptions) {
      if (a.grad_scale) return g / get(&StatsNumbers<T>::scale);
    }
    return g;
  }

  // Elements [from, to) of a vector in one thread's part of a row's sums.
  HFAC_DEVICE void add(const Grad& raw, T& sum, T& square, int from = 0, int to = kVector) {
    T g[kVector];
    A::widen(raw, g);
    HFAC_UNROLLED (k, kVector) {
      if (k < from || k >= to) continue;
      const T x = unscaled(g[k]);
      sum = sum + x;
      square = fused(x, x, square);
      if constexpr (kOptions) {
        if (a.nonfinite) bad = bad || nonfinite(x, get(&StatsNumbers<T>::elements));
      }
    }
  }

  HFAC_DEVICE void add(const Grad& raw, T inverse, T (&sums)[kSums][kVector], int from = 0, int to = kVector) const {
    T g[kVector];
    A::widen(raw, g);
    HFAC_UNROLLED (k, kVector) {
      if (k < from || k >= to) continue;
      const T x = unscaled(g[k]), square = x * x;
      sums[0][k] = sums[0][k] + x;
      sums[1][k] = sums[1][k] + square;
      sums[2][k] = fused(square, inverse, sums[2][k]);
    }
  }

  // r_i of a row whose sum of squares is known.
  HFAC_DEVICE T moment(T before, T square) const {
    using Numbers = StatsNumbers<T>;
    return hfac_average(get(&Numbers::beta), before, get(&Numbers::rest), square + get(&Numbers::eps));
  }
  // Of zeros alone the sum is -0: no other comes out as that.
  static HFAC_DEVICE T marked(T sum, T square) { return sum == T(0) && square == T(0) ? -T(0) : sum; }

  HFAC_DEVICE void finish() const {
    if (kOptions && a.nonfinite && bad) atomicOr(a.nonfinite + it.index, 1);
  }
};

// Which part of a block's rows a thread has.
struct RowThreads {
  int lanes, ys, y, x;  // threads that share a row; rows at once; the thread's row, and its place in it
  HFAC_DEVICE RowThreads(int of_row, int threads, int thread) : lanes(of_row) {
    const int part_of = ((1 << 20) + lanes - 1) / lanes;  // quotients by `lanes`, exact for as few threads
    ys = threads * part_of >> 20;
    y = thread * part_of >> 20;
    x = thread - y * lanes;
  }
};

// A tile's sums of columns, from threads to memory. It finds out anew what it knows of its thread and its item: kept
// from the beginning that would take registers which the rows have no other place for.
template <class A, int kVectors, int kThreads, class T>
HFAC_DEVICE void store_columns(const Arguments& a, const T (&sums)[kVectors][kSums][kVector], bool here) {
  keep_order();
  const int thread = kept(static_cast<int>(threadIdx.x));
  const Stats<A, false> s(a, tile_of(a));
  const RowThreads threads(s.it.tiling.lanes, kThreads, thread);
  const int lanes = threads.lanes, ys = threads.ys, y = threads.y, x = threads.x;
  const int cols = static_cast<int>(s.it.cols), step = lanes * kVector, first_col = x * kVector;
  T* const out = s.of_columns();
  if (ys == 1) {
    if (!here) return;
    HFAC_UNROLLED (v, kVectors) {
      if (first_col + v * step >= cols) continue;
      HFAC_UNROLLED (statistic, kSums) {
        T* const to = out + (statistic * cols + first_col + v * step);
        if constexpr (A::kWhole) {
          Raw<T> raw;
          pack(sums[v][statistic], raw);
          store_raw(to, raw);
        } else {
          const int count = vector_count(first_col + v * step, cols);
          HFAC_UNROLLED (k, kVector) {
            if (k < count) to[k] = sums[v][statistic][k];
          }
        }
      }
    }
    return;
  }
  // Threads of the same columns: their sums meet in the ring's memory, in the order of y.
  T* const meet = reinterpret_cast<T*>(dynamic_shared());
  HFAC_UNROLLED (v, kVectors) {
    __syncthreads();
    HFAC_UNROLLED (k, kSums * kVector) meet[k * kThreads + thread] = sums[v][k / kVector][k % kVector];
    __syncthreads();
    for (int k = y; here && k < kSums * kVector; k += ys) {
      T sum = T(0);
      for (int from = 0; from < ys; ++from) sum = sum + meet[k * kThreads + from * lanes + x];
      const int col = first_col + v * step + k % kVector;
      if (col < cols) out[k / kVector * cols + col] = sum;
    }
  }
}

// Rows of a few vectors per thread, whose columns' sums stay in registers for the whole tile.
//
// Rows come in batches, through a ring of batches in shared memory, which keeps them for both of their uses: a thread
// copies what it will use itself, so that it has nobody to wait for, and copies are under way all the time. While the
// sums of a batch's rows, one from each warp, become visible, all warps sum the rows of the next one. Each warp then
// finishes the rows on its own.
template <class A, Width kWidth, int kVectors, bool kFewer, bool kOptions>
HFAC_DEVICE void sum_rows(const Arguments& a) {
  using T = typename A::T;
  using Grad = typename A::Grad;
  constexpr int kElement = static_cast<int>(sizeof(Grad)) / kVector, kChunks = static_cast<int>(sizeof(Grad)) / 16;
  constexpr int kThreads = stats_threads(kWidth), kWarps = kThreads / kWarp;
  constexpr int kRows = stats_rows(kVectors, kElement, kFewer), kValues = 2 * kRows;
  constexpr int kStages = stats_stages(kVectors, kElement, kFewer, kWidth);
  static_assert(stats_ring(kVectors, kElement, kFewer, kWidth) <= stats_shared(kWidth, kElement), "the ring");
  static_assert(kSums * kVector * sizeof(T) * kThreads <= stats_shared(kWidth, kElement), "sums of columns");
  __shared__ T of_warps[2][kWarps][kValues];
  constexpr bool kLean = kOptions || (kMoreRegisters && kWidth == Width::kFour && kElement == 2);
  constexpr bool kOneRow = kLean && kWidth == Width::kLong;  // at a time: less for the compiler to work out
  using Numbers = StatsNumbers<T>;
  __shared__ Numbers numbers;
  Stats<A, kOptions, kLean> s(a, tile_of(a));
  s.begin(numbers);
  const int thread = static_cast<int>(threadIdx.x), its_lane = thread % kWarp;
  const RowThreads threads(s.it.tiling.lanes, kThreads, thread);
  const int lanes = threads.lanes, ys = kOneRow ? 1 : threads.ys;
  const int y = kOneRow ? 0 : threads.y, x = kOneRow ? thread : threads.x;
  const int warps = (lanes + kWarp - 1) / kWarp, batch = ys * kRows;
  const bool meet = kOneRow || warps > 1;
  // Else a warp that is left over. From the first lane, so that the compiler sees that a warp has one answer.
  const bool here = shuffle(static_cast<int>(kOneRow ? thread < lanes : y < ys), 0);

  Chunk* const ring = reinterpret_cast<Chunk*>(dynamic_shared()) + thread;
  const auto slot = [&](int stage, int r, int v, int c) {
    return ring + (((stage * kRows + r) * kVectors + v) * kChunks + c) * kThreads;
  };
  const int cols = static_cast<int>(s.it.cols), step = lanes * kVector, first_col = x * kVector;
  const int rows_bytes = ys * cols * kElement;
  // How many of its vectors of a row a thread has, and where its part of the next batch to be copied begins.
  int mine = 0;
  HFAC_UNROLLED (v, kVectors) mine += first_col + v * step < cols ? 1 : 0;
  const char* next = nullptr;
  if constexpr (A::kWhole) {
    next = static_cast<const char*>(s.grad.data) + ((s.first_row + y) * cols + first_col) * kElement;
    next = global(next);
  }
  // Of rows and columns that are not there: zeros.
  const auto begin = [&](int base, int stage) {
    HFAC_UNROLLED (r, kRows) {
      const int row = base + r * ys + y;
      HFAC_UNROLLED (v, kVectors) {
        const bool there = row < s.rows() && v < mine;
        if constexpr (A::kWhole) {
          const char* from = nullptr;
          if constexpr (kLean) {
            const int of_row = kElement == 4 ? s.get(&Numbers::cols) : cols;  // 32 bits leave one register less
            const int64_t at = static_cast<int64_t>(row) * of_row + first_col + v * step;
            from = global(static_cast<const char*>(s.get(&Numbers::data))) + at * kElement;
          } else {
            from = next + (r * rows_bytes + v * step * kElement);
          }
          HFAC_UNROLLED (c, kChunks) begin_copy(slot(stage, r, v, c), from + 16 * c, there);
        } else {
          Grad raw{};
          if (there) raw = s.load(row, first_col + v * step, vector_count(first_col + v * step, cols));
          HFAC_UNROLLED (c, kChunks) memcpy(slot(stage, r, v, c), reinterpret_cast<const char*>(&raw) + 16 * c, 16);
        }
      }
    }
    if constexpr (!kLean) next += kRows * rows_bytes;
  };
  const auto held = [&](int stage, int r, int v) {
    Grad raw;
    HFAC_UNROLLED (c, kChunks) {
      const Chunk chunk = load_chunk(slot(stage, r, v, c), false);
      memcpy(reinterpret_cast<char*>(&raw) + 16 * c, &chunk, 16);
    }
    return raw;
  };
  // Eight bytes of a vector at a time where there are few registers: body(raw, from, to), of elements [from, to).
  const auto in_pieces = [&](int stage, int r, int v, const auto& body) {
    if constexpr (!kLean) {
      body(held(stage, r, v), 0, kVector);
    } else {
      constexpr int kPieces = static_cast<int>(sizeof(Grad)) / 8, kPiece = kVector / kPieces;
      HFAC_UNROLLED (p, kPieces) {
        const uint2 piece = *reinterpret_cast<const uint2*>(slot(stage, r, v, p / 2)->word + p % 2 * 2);
        Grad raw{};
        memcpy(reinterpret_cast<char*>(&raw) + 8 * p, &piece, 8);
        body(raw, p * kPiece, (p + 1) * kPiece);
        keep_order();
      }
    }
  };
  // This warp's part of the batch's sums: of row (lane % kValues) / 2 the sum, or of odd lanes that of squares.
  const auto row_sums = [&](int stage) {
    T values[kValues];
    HFAC_UNROLLED (r, kRows) {
      values[2 * r] = values[2 * r + 1] = T(0);
      HFAC_UNROLLED (v, kVectors) {
        in_pieces(stage, r, v,
                  [&](const Grad& raw, int from, int to) { s.add(raw, values[2 * r], values[2 * r + 1], from, to); });
      }
    }
    return sum_values(values, lanes);
  };
  // Of the rows of a batch the one whose sum this lane has, or of odd lanes its sum of squares.
  const int my_row = its_lane % kValues / 2 * ys + y;
  const T* const moments = kLean ? nullptr : s.moments_before() + my_row;
  T* const fresh = kLean ? nullptr : s.of_rows(its_lane % 2) + my_row;
  const auto moment_before = [&](int base) {
    if (base + my_row >= s.rows()) return T(0);
    if constexpr (kLean) return global(s.get(&Numbers::moments))[base + my_row];
    return moments[base];
  };

  T sums[kVectors][kSums][kVector];
  HFAC_UNROLLED (k, kVectors * kSums * kVector) {
    sums[k / (kSums * kVector)][k / kVector % kSums][k % kVector] = T(0);
  }
  T part = T(0), before = T(0);
  if (here) {
    HFAC_UNROLLED (k, kStages) {
      if (k * batch < s.rows()) begin(k * batch, k);
      commit_copies();
    }
    before = moment_before(0);
    wait_for_copies<kStages - 1>();
    part = row_sums(0);
  }
  int stage = 0, turn = 0;
  for (int base = 0; base < s.rows(); base += batch, turn ^= 1) {
    const int lane = kLean ? thread_anew() % kWarp : its_lane;
    const bool odd = lane % 2;
    T total = part;
    if (meet) {  // in turn: who writes a set again has passed a barrier behind all reads of it
      if (lane < kValues) of_warps[turn][thread / kWarp][lane] = part;
      __syncthreads();
    }
    if (!here) continue;
    if (meet && kWidth != Width::kLong) {  // in an order that does not depend on the type
      total = T(0);
      HFAC_UNROLLED (w, kWarps) {
        if (w < warps) total = total + of_warps[turn][y * warps + w][lane % kValues];
      }
    } else if (meet) {
      total = T(0);
      HFAC_UNROLLED (k, kWarps * kValues / kWarp) {
        const int w = lane / kValues + k * (kWarp / kValues);
        if (w < warps) total = total + of_warps[turn][y * warps + w][lane % kValues];
      }
    }
    const int following = stage + 1 == kStages ? 0 : stage + 1;
    T before_next = T(0);
    if (base + batch < s.rows()) {
      before_next = moment_before(base + batch);
      wait_for_copies<kStages - 2>();
      part = row_sums(following);
    }
    if (meet && kWidth == Width::kLong) {
#pragma unroll
      for (int mask = kValues; mask < kWarp; mask *= 2) total = total + shuffle_xor(total, mask);
    }

    // Both lanes of a row have its r, for the columns' sums; the first lanes of the row's threads store what is new.
    const T other = shuffle_xor(total, 1);
    const T r_new = s.moment(before, odd ? total : other);
    const bool there = base + my_row < s.rows();
    if (there && x < kValues) {
      const T value = odd ? r_new : s.marked(total, other);
      if constexpr (kLean) {
        global(odd ? s.get(&Numbers::fresh_square) : s.get(&Numbers::fresh))[base + my_row] = value;
      } else {
        fresh[base] = value;
      }
    }
    const T inverse = there ? T(1) / r_new : T(0);
    HFAC_UNROLLED (r, kRows) {
      const T of_row = shuffle(inverse, lane / kValues * kValues + 2 * r);
      HFAC_UNROLLED (v, kVectors) {
        in_pieces(stage, r, v, [&](const Grad& raw, int from, int to) { s.add(raw, of_row, sums[v], from, to); });
        keep_order();
      }
    }
    if (base + kStages * batch < s.rows()) begin(base + kStages * batch, stage);
    commit_copies();
    stage = following;
    before = before_next;
  }
  s.finish();
  store_columns<A, kVectors, kThreads>(a, sums, here);
}

// Rows of all lengths but the longest, in one launch.
template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kRows), A::kWhole ? 2 : 1) hfac_stats(Arguments a) {
  constexpr int kElement = static_cast<int>(sizeof(typename A::Grad)) / kVector;
  if (skipped(a) || unclipped(a)) return;
  const Tiling tiling = a.items[tile_of(a).item].tiling;
  if constexpr (A::kWhole) {
    if (a.items[tile_of(a).item].single) {
      return sum_rows<typename SingleOf<A>::Type, Width::kRows, 1, true, kOptions>(a);
    }
  }
  if constexpr (kElement == 2) {
    if (fewer_rows(Width::kRows, tiling.vectors, tiling.lanes, kElement)) {
      return sum_rows<A, Width::kRows, 1, true, kOptions>(a);
    }
  }
  switch (tiling.vectors) {
    case 1:
      return sum_rows<A, Width::kRows, 1, false, kOptions>(a);
    case 2:
      return sum_rows<A, Width::kRows, 2, false, kOptions>(a);
    default:
      return sum_rows<A, Width::kRows, 3, false, kOptions>(a);
  }
}

// Its columns' sums take all the registers of a thread, of which the other lengths would have some.
template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kFour), kOptions ? 1 : 2) hfac_stats_four(Arguments a) {
  if (skipped(a) || unclipped(a)) return;
  sum_rows<A, Width::kFour, stats_vectors(Width::kFour), false, kOptions>(a);
}

template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kLong), 1) hfac_stats_long(Arguments a) {
  if (skipped(a) || unclipped(a)) return;
  sum_rows<A, Width::kLong, stats_vectors(Width::kLong), true, kOptions>(a);
}

// Rows of any length: a few at a time, read twice, with the columns' sums in the workspace.
template <class A>
__global__ void __launch_bounds__(stats_threads(Width::kWide), 1) hfac_stats_wide(Arguments a) {
  using T = typename A::T;
  constexpr int kThreads = stats_threads(Width::kWide), kWarps = kThreads / kWarp;
  __shared__ T of_warps[kWideRows * 2][kWarps], inverse[kWideRows];
  if (skipped(a) || unclipped(a)) return;
  __shared__ StatsNumbers<T> numbers;  // of nobody: registers suffice
  Stats<A, true> s(a, tile_of(a));
  s.begin(numbers);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t cols = s.it.cols;
  T* const out = s.of_columns();
  for (int base = 0; base < s.rows(); base += kWideRows) {
    for (int first = 0; first < kWideRows; first += kRowsInFlight) {
      T values[2 * kRowsInFlight];
      HFAC_UNROLLED (k, 2 * kRowsInFlight) values[k] = T(0);
      for (int64_t col = thread * kVector; col < cols; col += kThreads * kVector) {
        const int count = vector_count(col, cols);
        HFAC_UNROLLED (r, kRowsInFlight) {
          const int row = base + first + r;
          if (row < s.rows()) s.add(s.load(row, col, count), values[2 * r], values[2 * r + 1]);
        }
      }
      const T sum = sum_values(values, kWarp);
      const int lane = thread % kWarp;
      if (lane < 2 * kRowsInFlight) of_warps[2 * first + lane][thread / kWarp] = sum;
    }
    __syncthreads();
    if (thread < kWideRows && base + thread < s.rows()) {
      T sum = T(0), square = T(0);
      for (int w = 0; w < kWarps; ++w) {
        sum = sum + of_warps[2 * thread][w];
        square = square + of_warps[2 * thread + 1][w];
      }
      const T r_new = s.moment(s.moments_before()[base + thread], square);
      s.of_rows(false)[base + thread] = s.marked(sum, square);
      s.of_rows(true)[base + thread] = r_new;
      inverse[thread] = T(1) / r_new;
    }
    __syncthreads();
    for (int64_t col = thread * kVector; col < cols; col += kThreads * kVector) {
      const int count = vector_count(col, cols);
      T sums[kSums][kVector];
      HFAC_UNROLLED (k, kSums * kVector) {
        const bool kept = base > 0 && k % kVector < count;
        sums[k / kVector][k % kVector] = kept ? out[k / kVector * cols + col + k % kVector] : T(0);
      }
      for (int r = 0; r < kWideRows && base + r < s.rows(); ++r) {
        s.add(s.load(base + r, col, count), inverse[r], sums);
      }
      HFAC_UNROLLED (k, kSums * kVector) {
        if (k % kVector < count) out[k / kVector * cols + col + k % kVector] = sums[k / kVector][k % kVector];
      }
    }
  }
  s.finish();
}

// A device whose blocks have too little shared memory for a launch's ring reads rows twice.
bool fits(const Launch& l) {
#ifdef HFAC_DEVICE_COMPILER
  if (l.shared <= kRingBytes) return true;
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return l.shared + (1 << 10) <= most;
#else
  (void)l;
  return true;
#endif
}

template <class A, bool kOptions>
KernelFunction stats_kernel(Width width) {
  if (width == Width::kRows) return hfac_stats<A, kOptions>;
  if constexpr (A::kWhole) {
    if (width == Width::kFour) return hfac_stats_four<A, kOptions>;
    if (width == Width::kLong) return hfac_stats_long<A, kOptions>;
  }
  return hfac_stats_wide<A>;
}

}  // namespace

KernelFunction hfac_stats_kernel(const Launch& l, const Arguments& a) {
  return kernel_for(l.access, GradAccesses(), [&](auto access) -> KernelFunction {
    using A = decltype(access);
    const Width width = fits(l) ? l.width : Width::kWide;
    if constexpr (!kPlainStep) {
      if (a.nonfinite || a.grad_scale) return stats_kernel<A, true>(width);
    }
    return stats_kernel<A, false>(width);
  });
}

int hfac_stats_shared(const Launch& l) { return fits(l) ? l.shared : 0; }

}  // namespace hfac
