// H-Fac's statistics: sums of rows and columns from one read of the gradient.
//
// They hold whole rows, because r_i is needed for the third column sum, that of g^2 / r_i, which gives the clip norm
// without a third read:
//     sum_ij U_ij^2 = R sum_j w_j / s_j,  w_j = sum_i g_ij^2 / r_i,  R = sum_i r_i.
#include "copies.cuh"
#include "hfac_columns.cuh"

namespace hfac {
namespace {

// Rows of a few vectors per thread, whose columns' sums stay in registers for the whole tile.
//
// Rows come in batches, through a ring of batches in shared memory, which keeps them for both of their uses: a thread
// copies what it will use itself, so that it has nobody to wait for, and copies are under way all the time. While the
// sums of a batch's rows, one from each warp, become visible, all warps sum the rows of the next one. Each warp then
// finishes the rows on its own.
// kNarrow: as few threads share a row as there are rows in a batch, so that each has one row's sum and its squares'.
template <class A, Width kWidth, int kVectors, bool kOptions, bool kNarrow = false>
HFAC_DEVICE void sum_rows(const Arguments& a, const Tile& tile) {
  using T = typename A::T;
  using Grad = typename A::Grad;
  constexpr int kElement = static_cast<int>(sizeof(Grad)) / kVector, kChunks = static_cast<int>(sizeof(Grad)) / 16;
  constexpr int kThreads = stats_threads(kWidth), kWarps = kThreads / kWarp;
  constexpr int kRows = stats_rows(kVectors, kElement), kValues = 2 * kRows;
  constexpr int kStages = stats_stages(kVectors, kElement, kWidth), kSets = kNarrow ? 2 : 1, kOwners = kValues / kSets;
  constexpr bool kOneRow = kWidth != Width::kRows;  // at a time: less for the compiler to work out
  static_assert(stats_ring(kVectors, kElement, kWidth) <= stats_shared(kWidth, kElement), "the ring");
  static_assert(
      kOneRow || (A::kWhole ? kVectors : 1) * kSums * kVector * sizeof(T) * kThreads <= stats_shared(kWidth, kElement),
      "sums of columns");
  __shared__ T of_warps[2][kWarps][kValues];
  constexpr bool kLean = kOptions || (kMoreRegisters && kWidth == Width::kFour && kElement == 2);
  using Numbers = StatsNumbers<T>;
  __shared__ Numbers numbers;
  Stats<A, kOptions, kLean> s(a, tile);
  s.begin(numbers);
  // Quotients of numbers without a sign take one instruction, others three; but then compilers form the lane anew so
  // often that rows of four vectors would spill.
  const int thread = static_cast<int>(threadIdx.x);
  const int its_lane = kWidth == Width::kFour ? thread % kWarp : static_cast<int>(threadIdx.x % kWarp);
  const int its_warp = static_cast<int>(threadIdx.x / kWarp), narrow_y = static_cast<int>(threadIdx.x / kRows);
  const RowThreads threads(s.it.tiling, kThreads, thread);
  const int lanes = kNarrow ? kRows : threads.lanes, ys = kOneRow ? 1 : kNarrow ? kThreads / kRows : threads.ys;
  const int y = kOneRow ? 0 : kNarrow ? narrow_y : threads.y;
  const int x = kOneRow ? thread : kNarrow ? thread - narrow_y * kRows : threads.x;
  const int warps = (lanes + kWarp - 1) / kWarp, batch = ys * kRows;
  const bool meet = kOneRow || warps > 1;
  // Else a warp that is left over. From the first lane, so that the compiler sees that a warp has one answer.
  const bool here = kNarrow || shuffle(static_cast<int>(kOneRow ? thread < lanes : y < ys), 0);

  // Kept in a register, where there is one: each use of an address in shared memory otherwise takes four instructions.
  constexpr bool kKept = !kLean && kWidth != Width::kFour;
  Chunk* ring = reinterpret_cast<Chunk*>(dynamic_shared()) + thread;
  if constexpr (kKept) ring = kept_shared(ring);
  const auto slot = [&](int stage, int r, int v, int c) {
    return ring + (((stage * kRows + r) * kVectors + v) * kChunks + c) * kThreads;
  };
  const int cols = static_cast<int>(s.it.cols), step = lanes * kVector, first_col = x * kVector;
  const int rows_bytes = ys * cols * kElement;
  // Has the thread vectors in all places of the tile's rows, which are then whole batches? Nearly all have.
  const bool every = first_col + (kVectors - 1) * step < cols && s.rows() == s.it.tiling.rows;
  // Where its part of the next batch to be copied begins.
  const char* next = nullptr;
  if constexpr (A::kWhole) {
    next = static_cast<const char*>(s.grad.data) + s.first_row * cols * kElement;
    next = global(next) + (y * cols + first_col) * kElement;
  }
  // Of rows and columns that are not there: zeros.
  const auto begin = [&](int base, int stage, const auto& is_there) {
    HFAC_UNROLLED (r, kRows) {
      const int row = base + r * ys + y;
      HFAC_UNROLLED (v, kVectors) {
        const auto there = is_there(row, v);
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
  const auto where = [&](const auto& body) {
    const auto some = [&](int row, int v) { return row < s.rows() && first_col + v * step < cols; };
    if constexpr (A::kWhole && !kLean && kWidth != Width::kFour) {
      if (every) return body([](int, int) { return std::true_type(); });
    }
    body(some);
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
  // This warp's part of the batch's sums: of row (lane % kValues) / 2 the sum, or of odd lanes that of squares;
  // kNarrow: of row lane % kRows both.
  const auto row_sums = [&](int stage, T(&out)[kSets]) {
    T values[kSets][kOwners];
    HFAC_UNROLLED (r, kRows) {
      T &sum = values[0][kNarrow ? r : 2 * r], &square = kNarrow ? values[kSets - 1][r] : values[0][2 * r + 1];
      sum = square = T(0);
      HFAC_UNROLLED (v, kVectors) {
        in_pieces(stage, r, v, [&](const Grad& raw, int from, int to) { s.add(raw, sum, square, from, to); });
      }
    }
    HFAC_UNROLLED (k, kSets) out[k] = sum_values(values[k], lanes);
  };
  // Of the rows of a batch the one of which this lane has sums.
  const auto row_of = [&](int lane) { return (kNarrow ? lane % kRows : lane % kValues / 2) * ys + y; };
  const int my_row = row_of(its_lane);
  const T* const moments = kLean ? nullptr : s.moments_before() + my_row;
  T* fresh = kLean ? nullptr : s.of_rows(!kNarrow && its_lane % 2) + my_row;
  if constexpr (kKept) fresh = global(kept(fresh));
  const auto moment_before = [&](int base) {
    if (base + my_row >= s.rows()) return T(0);
    if constexpr (kLean) return global(s.get(&Numbers::moments))[base + my_row];
    return moments[base];
  };

  T sums[kVectors][kSums][kVector];
  HFAC_UNROLLED (k, kVectors * kSums * kVector) {
    sums[k / (kSums * kVector)][k / kVector % kSums][k % kVector] = T(0);
  }
  T part[kSets]{}, before = T(0);
  if (here) {
    where([&](const auto& there) {
      HFAC_UNROLLED (k, kStages) {
        if (k * batch < s.rows()) begin(k * batch, k, there);
        commit_copies();
      }
    });
    before = moment_before(0);
    wait_for_copies<kStages - 1>();
    row_sums(0, part);
  }
  int stage = 0, turn = 0;
  // Where a warp puts its part of a batch's sums, and where those of its rows are.
  T *my_part = nullptr, *parts = nullptr;
  if constexpr (kKept) {
    my_part = kept_shared((&of_warps[0][its_warp][its_lane % kValues]));
    parts = kept_shared((&of_warps[0][static_cast<unsigned>(y * warps) % kWarps][its_lane % kValues]));
  }
  int base = 0;
  do {  // no tile is without rows
    const int lane = kLean ? thread_anew() % kWarp : its_lane;
    const bool odd = lane % 2;
    T total = part[0], square = part[kSets - 1];
    if (meet) {  // in turn: who writes a set again has passed a barrier behind all reads of it
      if (lane < kValues)
        *(kKept ? my_part + turn * kWarps * kValues : &of_warps[turn][thread / kWarp][lane]) = part[0];
      __syncthreads();
    }
    if (!here) continue;
    if (meet) {  // in an order that does not depend on the type
      const auto of = [&](int w) {
        if constexpr (kKept) return parts[(turn * kWarps + w) * kValues];
        return of_warps[turn][y * warps + w][lane % kValues];
      };
      const auto add = [&](int w) {
        if (w < warps) total = total + of(w);
      };
      total = of(0) + of(1);
      if (warps > 2) {
        HFAC_UNROLLED (w, 2) add(2 + w);
        if (warps > 4) {
          HFAC_UNROLLED (w, kWarps - 4) add(4 + w);
        }
      }
    }
    const int following = stage + 1 == kStages ? 0 : stage + 1;
    T before_next = T(0);
    if (base + batch < s.rows()) {
      before_next = moment_before(base + batch);
      wait_for_copies<kStages - 2>();
      row_sums(following, part);
    }
    // All lanes of a row have its r, for the columns' sums; the first lanes of the row's threads store what is new.
    const T other = kNarrow ? square : shuffle_xor(total, 1);
    const T r_new = s.moment(before, kNarrow || !odd ? other : total);
    const bool there = base + my_row < s.rows();
    if (there && x < kOwners) {
      const T sum = s.marked(total, other);
      if constexpr (kLean) {
        if (kNarrow || !odd) global(s.get(&Numbers::fresh))[base + my_row] = sum;
        if (kNarrow || odd) global(s.get(&Numbers::fresh_square))[base + my_row] = r_new;
      } else if constexpr (kNarrow) {
        fresh[base] = sum;
        fresh[base + s.it.rows] = r_new;
      } else {
        fresh[base] = odd ? r_new : sum;
      }
    }
    const T quotient = reciprocal(r_new), inverse = there ? quotient : T(0);
    HFAC_UNROLLED (r, kRows) {
      const T by = shuffle(inverse, lane / kOwners * kOwners + (kNarrow ? r : 2 * r));
      HFAC_UNROLLED (v, kVectors) {
        in_pieces(stage, r, v, [&](const Grad& raw, int from, int to) { s.add(raw, by, sums[v], from, to); });
        keep_order();
      }
    }
    if (base + kStages * batch < s.rows()) {
      where([&](const auto& there) { begin(base + kStages * batch, stage, there); });
    }
    commit_copies();
    stage = following;
    before = before_next;
  } while (turn ^= 1, (base += batch) < s.rows());
  s.finish();
  store_columns<A, kVectors, kThreads>(a, sums, kOneRow);
}

// Rows of all lengths but the longest, in one launch.
template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kRows), A::kWhole ? 2 : 1) hfac_stats(Arguments a) {
  constexpr int kElement = static_cast<int>(sizeof(typename A::Grad)) / kVector;
  if (kOptions && has_statistics(a)) return;
  const Tile tile = forward_tile(a);
  const DeviceItem& it = a.items[tile.item];
  if constexpr (A::kWhole) {
    if (it.single) return sum_rows<typename SingleOf<A>::Type, Width::kRows, 1, kOptions>(a, tile);
  }
  if constexpr (kElement == 2) {
    if (it.tiling.lanes == kNarrowLanes && it.tiling.vectors == 1)
      return sum_rows<A, Width::kRows, 1, kOptions, true>(a, tile);
  }
  switch (it.tiling.vectors) {
    case 1:
      return sum_rows<A, Width::kRows, 1, kOptions>(a, tile);
    case 2:
      return sum_rows<A, Width::kRows, 2, kOptions>(a, tile);
    default:
      return sum_rows<A, Width::kRows, 3, kOptions>(a, tile);
  }
}

// Its columns' sums take all the registers of a thread, of which the other lengths would have some.
template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kFour), kOptions ? 1 : 2) hfac_stats_four(Arguments a) {
  if (kOptions && has_statistics(a)) return;
  sum_rows<A, Width::kFour, stats_vectors(Width::kFour), kOptions>(a, forward_tile(a));
}

template <class A, bool kOptions>
__global__ void __launch_bounds__(stats_threads(Width::kLong), 1) hfac_stats_long(Arguments a) {
  if (kOptions && has_statistics(a)) return;
  const Tile tile = forward_tile(a);
  if (a.items[tile.item].tiling.vectors == kLongVectors)
    return sum_rows<A, Width::kLong, kLongVectors, kOptions>(a, tile);
  sum_rows<A, Width::kLong, stats_vectors(Width::kLong), kOptions>(a, tile);
}

// Rows of any length: a few at a time, read twice, with the columns' sums in the workspace.
template <class A>
__global__ void __launch_bounds__(stats_threads(Width::kWide), 1) hfac_stats_wide(Arguments a) {
  using T = typename A::T;
  constexpr int kThreads = stats_threads(Width::kWide), kWarps = kThreads / kWarp;
  __shared__ T of_warps[kWideRows * 2][kWarps], inverse[kWideRows];
  if (has_statistics(a)) return;
  __shared__ StatsNumbers<T> numbers;  // of nobody: registers suffice
  Stats<A, true> s(a, forward_tile(a));
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
      if (a.nonfinite || a.grad_scale || a.found_inf || a.clip) return stats_kernel<A, true>(width);
    }
    return stats_kernel<A, false>(width);
  });
}

int hfac_stats_shared(const Launch& l) { return fits(l) ? l.shared : 0; }

}  // namespace hfac
