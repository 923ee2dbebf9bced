// H-Fac's second read of a gradient, which updates a tile of the parameter: of both forms of the first moment.
#pragma once

#include "codes.cuh"
#include "hfac_element.cuh"
#include "hfac_moments.cuh"

namespace hfac {

// What all elements of a matrix have in common.
template <class T>
struct Scales {
  T scale, divisor, growth;  // sqrt(R); what U is divided by; of codes how sqrt(R) has grown
};

// What the update needs of a row: the fold's number and the factor of the gradient.
template <class T>
struct UpdateRows {
  Scales<T> scales;
  T first[kRowsInFlight * kTileThreads], scale[kRowsInFlight * kTileThreads];
};
// And of the moment's codes what they stand for.
template <class T>
struct CodeRows : UpdateRows<T> {
  CodeTable<T> table;
};

// Rows of a thread whose loads are issued together. `kAhead`: of two such sets one is under way while the other is
// worked on. Not where there are codes, which take so many registers that it would be slower. Nothing is worked out of
// what is loaded before all loads of a set are under way: it would have to be waited for.
template <class A, bool kCodes>
struct UpdateLoads {
  static constexpr bool kAhead = A::kWhole && !kCodes;
  static constexpr int kSets = kAhead ? 2 : 1;
  static constexpr int kRows = kAhead || (kCodes && A::kRows == 1) ? 2 : kRowsInFlight;
  typename A::Grad g[kRows];
  typename A::Param w[kRows];
  [[maybe_unused]] Codes codes[kCodes ? kRows : 1];
};

// What the fold leaves for all rows and columns. Of few chunks a warp adds up what they have, in the order in which the
// fold's last block does it of more: that would do so alone, while nothing is under way.
template <bool kWatched, bool kCodes, class Shared, class T = decltype(Shared::scales.scale)>
HFAC_DEVICE Scales<T> take_scales(const Arguments& a, const DeviceItem& it, int index, Shared& shared) {
  constexpr int kTotals = kCodes ? kFoldTotals : 2;
  const HfacSpace<T> space(it, a.workspace);
  const int few = it.chunks;
  if (!few) return {*space.scale, *space.divisor, kCodes ? *space.growth : T(0)};
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < kWarp) {
    double totals[kTotals] = {};
    for (int chunk = lane; chunk - lane < few; chunk += kWarp) {
      double part[kTotals];
      HFAC_UNROLLED (j, kTotals) part[j] = chunk < few ? space.norms[chunk * kFoldTotals + j] : 0.0;
      warp_sums(part);
      HFAC_UNROLLED (j, kTotals) totals[j] = totals[j] + part[j];
    }
    const double norm = totals[0] * totals[1];
    const double mean_square = norm / (static_cast<double>(it.rows) * static_cast<double>(it.cols));
    const T scale = root(static_cast<T>(totals[0])), divisor = clip_divisor(a.options, static_cast<T>(mean_square));
    if (lane == 0) {
      shared.scales = {scale, divisor, kCodes ? growth_of(scale, totals[kTotals - 1]) : T(0)};
      if (kWatched && index == 0) a.watched[int64_t{it.index} * kWatchedNumbers + kDirection] += norm;
    }
  }
  __syncthreads();
  return shared.scales;
}

// No root and no division in the loop but those of codes: a tile's rows are prepared in shared memory, its columns in
// registers. `kCodes`: the first moment is whole, in 8 bits.
template <class A, bool kWatched, bool kCodes, class Shared>
HFAC_DEVICE void update_tile_of(const Arguments& a, const Tile& tile, Shared& shared) {
  using T = typename A::T;
  const DeviceItem& it = a.items[tile.item];
  // While the first rows are under way, where there are registers for that; of 32 bits bytes bind in any case.
  constexpr bool kMeanwhile = A::kWhole && (kCodes || sizeof(typename A::Grad) + sizeof(typename A::Param) <= 32);
  Scales<T> scales;
  if constexpr (!kMeanwhile) scales = take_scales<kWatched, kCodes>(a, it, tile.index, shared);
  const Tiling tiling = it.update;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t rows = it.rows, cols = it.cols;
  // Most rows are one tile. Quotients by lanes, a power of two, are shifts: others take 20 instructions each.
  const bool one = tiling.col_tiles == 1;
  const int row_tile = one ? tile.index : static_cast<int>(static_cast<unsigned>(tile.index) / tiling.col_tiles);
  const int col_tile = tile.index - row_tile * tiling.col_tiles;
  const int thread = static_cast<int>(threadIdx.x), shift = log2_of(tiling.lanes);
  const int x = thread & (tiling.lanes - 1), y = kept(thread >> shift), ys = kept(kTileThreads >> shift);
  const int64_t first_row = static_cast<int64_t>(row_tile) * tiling.rows;
  const int tile_rows = static_cast<int>(rows - first_row < tiling.rows ? rows - first_row : tiling.rows);
  const int64_t tile_end = static_cast<int64_t>(col_tile + 1) * tiling.cols;
  const int64_t col = static_cast<int64_t>(col_tile) * tiling.cols + x * kVector;
  const int count = vector_count(col, tile_end < cols ? tile_end : cols);

  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  [[maybe_unused]] const CodesAt<A> codes_at(a, it);

  using Loads = UpdateLoads<A, kCodes>;
  const int end = count ? tile_rows : 0;
  const int64_t between = int64_t{ys} * cols;  // rows of a thread
  const auto load = [&](Loads& into, int row, int64_t from) {
    HFAC_UNROLLED (r, Loads::kRows) {
      if (row + r * ys >= end) continue;
      const int64_t at = from + r * between;
      into.g[r] = A::grad(grad, a.layouts, at, count, true);
      into.w[r] = A::param(param, a.layouts, at, count);
      if constexpr (kCodes) into.codes[r] = codes_at.load(at, count);
    }
  };
  Loads loads[Loads::kSets];
  int64_t element = (first_row + y) * cols + col;  // the thread's, of the rows that it is at
  load(loads[0], y, element);

  if constexpr (kMeanwhile) scales = take_scales<kWatched, kCodes>(a, it, tile.index, shared);
  const T scale = scales.scale, divisor = scales.divisor;
  const Decay<T> b1(a.scalars.beta1, it.index);
  T col_first[kVector], col_scale[kVector];
  if constexpr (A::kWhole) {  // in 16 bytes; without columns none is used
    const int64_t from = count ? col : 0;
    unpack(load_raw(space.col_first + from, false), col_first);
    unpack(load_raw(space.col_scale + from, false), col_scale);
  } else {
    HFAC_UNROLLED (k, kVector) {
      col_first[k] = k < count ? space.col_first[col + k] : T(0);
      col_scale[k] = k < count ? space.col_scale[col + k] : T(0);
    }
  }
  if constexpr (kCodes) make_table(shared.table);
  [[maybe_unused]] const T growth = scales.growth, part = (a.options.maximize ? -b1.rest : b1.rest) * scale;
  for (int k = thread; k < tile_rows; k += kTileThreads) {
    const T first = space.row_sum[first_row + k], inverse = space.row_square[first_row + k];
    if constexpr (kCodes) {
      shared.first[k] = growth == T(0) ? T(0) : b1.beta * (first * growth);
      shared.scale[k] = part * inverse;
    } else {
      shared.first[k] = first;
      shared.scale[k] = scale * inverse / divisor;
    }
  }
  const Gradient<T> gradient(a);
  const T lr = static_cast<T>(value_of(a.scalars.lr, 0));
  const T weight_decay = static_cast<T>(value_of(a.scalars.weight_decay, 0));
  [[maybe_unused]] const T step = lr * (T(1) / divisor), decay = lr * weight_decay;
  __syncthreads();

  [[maybe_unused]] const Constants<T, kCodes> constants(shared);
  Watch<A> watch;
  const auto update = [&](const Loads& loaded, int r, int row) {
    const int64_t at = element + r * between;
    T g[kVector], w[kVector];
    A::widen(loaded.g[r], g);
    A::widen(loaded.w[r], w);
    if constexpr (kCodes) {
      gradient.unscale(g);  // the sign is in the row's factor
    } else {
      gradient(g);
    }
    const T row_first = shared.first[row], row_scale = shared.scale[row];  // here: earlier, some kernels would spill
    if constexpr (kCodes) {
      T moment[kVector];
      Codes codes = biased(loaded.codes[r]);
      HFAC_UNROLLED (j, kVector) g[j] = g[j] * col_scale[j] * row_scale;
      step_codes(codes, shared.table, row_first, col_first, g, constants, A::rough(param), moment);
      HFAC_UNROLLED (j, kVector) {
        w[j] = updated_by_moment(w[j], moment[j], g[j], b1.beta, step, decay, A::rough(param));
      }
      codes_at.store(at, count, biased(codes));
    } else {
      HFAC_UNROLLED (j, kVector) {
        w[j] = updated(w[j], g[j], row_first, col_first[j], col_scale[j], row_scale, lr, weight_decay, A::rough(param));
      }
    }
    if constexpr (kWatched) {
      T old[kVector];
      A::widen(loaded.w[r], old);
      watch.add(param, old, w, count);
    }
    A::store(param, a.layouts, at, count, w);
  };
  const int of_set = ys * Loads::kRows;
  for (int base = 0; base < end; base += Loads::kSets * of_set) {
    HFAC_UNROLLED (s, Loads::kSets) {
      const int row = base + s * of_set + y;
      const int64_t next = element + Loads::kRows * between;
      if constexpr (Loads::kAhead) load(loads[(s + 1) % 2], row + of_set, next);
      HFAC_UNROLLED (r, Loads::kRows) {
        if (row + r * ys < end) update(loads[s], r, row + r * ys);
      }
      if constexpr (!Loads::kAhead) load(loads[s], row + of_set, next);
      element = next;
    }
  }
  if constexpr (kWatched) watch.finish(a, it);
}

template <class A, bool kWatched, bool kCodes>
HFAC_DEVICE void update_tile(const Arguments& a) {
  using T = typename A::T;
  __shared__ std::conditional_t<kCodes, CodeRows<T>, UpdateRows<T>> shared;
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  if constexpr (SingleOf<A>::kThere) {
    if (it.single) return update_tile_of<typename SingleOf<A>::Type, kWatched, kCodes>(a, tile, shared);
  }
  update_tile_of<A, kWatched, kCodes>(a, tile, shared);
}

}  // namespace hfac
