// H-Fac's statistics: a tile's sums of columns, from the threads that have them to memory.
#pragma once

#include <type_traits>

#include "hfac_stats.cuh"

namespace hfac {

// kWidth neighbouring numbers, as they are loaded and stored at once.
template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Piece {
  T value[kWidth];
};
template <int k>
using Constant = std::integral_constant<int, k>;
template <class T, int kWidth>
HFAC_DEVICE void store_piece(T* to, const Piece<T, kWidth>& piece) {
  if constexpr (sizeof(piece) == sizeof(Chunk)) {
    Chunk chunk;
    memcpy(&chunk, &piece, sizeof(chunk));
    store_chunk(to, chunk);
  } else if constexpr (sizeof(piece) == sizeof(uint2) && kWidth > 1) {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits_of(piece.value[0]), bits_of(piece.value[1]));
  } else {
    *to = piece.value[0];
  }
}

// Sums of columns that threads have put into shared memory, kPack neighbours of one thread in one place, of kValues
// numbers in all: kWidth of them at a time are added up by one of the threads of their columns, in the order of y, and
// passed on as put(which is the first, sums). kYs: how many threads those are, where that is known, or 0; kLanes: those
// of a row, likewise.
template <int kWidth, int kPack, unsigned kValues, int kThreads, int kYs, int kLanes, class T, class Put>
HFAC_DEVICE void add_met(const T* memory, const RowThreads& threads, const Put& put) {
  using Sums = Piece<T, kWidth>;
  const int ys = kYs ? kYs : threads.ys, step = (kLanes ? kLanes : threads.lanes) * kPack;
  for (unsigned k = threads.y * kWidth; k < kValues; k += ys * kWidth) {
    const T* from = memory + ((k / kPack * kThreads + threads.x) * kPack + k % kPack);
    Sums sums = *reinterpret_cast<const Sums*>(from);
    const auto add = [&](int y) {
      const Sums other = *reinterpret_cast<const Sums*>(from + y * step);
      HFAC_UNROLLED (j, kWidth) sums.value[j] = sums.value[j] + other.value[j];
    };
    if constexpr (kYs != 0) {
      HFAC_UNROLLED (y, kYs - 1) add(y + 1);
    } else {
#pragma unroll 8
      for (int y = 1; y < ys; ++y) add(y);
    }
    put(k, sums);
  }
}

// A tile's sums of columns, from threads to memory. It finds out anew what it knows of its thread and its item: kept
// from the beginning that would take registers which the rows have no other place for. `alone`: no other threads have
// the same columns.
template <class A, int kVectors, int kThreads, class T>
HFAC_DEVICE void store_columns(const Arguments& a, const T (&sums)[kVectors][kSums][kVector], bool alone) {
  keep_order();
  const int thread = kept(static_cast<int>(threadIdx.x));
  const Stats<A, false> s(a, forward_tile(a));
  const RowThreads threads(s.it.tiling, kThreads, thread);
  const int cols = static_cast<int>(s.it.cols), step = threads.lanes * kVector, first_col = threads.x * kVector;
  const bool here = threads.y < threads.ys;  // else its warp is left over
  T* const out = global(kept(s.of_columns()));
  if (alone || threads.ys == 1) {
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
  // In the ring's memory; of whole vectors all at once, in pieces so small that most threads have some.
  constexpr int kAtOnce = A::kWhole ? kVectors : 1, kPack = A::kWhole ? 4 : 1;
  T* const meet = reinterpret_cast<T*>(dynamic_shared());
  HFAC_UNROLLED (turn, kVectors / kAtOnce) {
    const int first = turn * kAtOnce;
    __syncthreads();
    HFAC_UNROLLED (p, kAtOnce * kSums * kVector / kPack) {
      const auto& of = sums[first + p * kPack / kVector % kAtOnce][p * kPack / (kAtOnce * kVector)];
      Piece<T, kPack> piece;
      HFAC_UNROLLED (j, kPack) piece.value[j] = of[p * kPack % kVector + j];
      store_piece(meet + (p * kThreads + thread) * kPack, piece);
    }
    __syncthreads();
    if (!here) continue;
    const auto add = [&](auto width, auto known) {
      constexpr int kWidth = decltype(width)::value, kYs = decltype(known)::value;
      const auto put = [&](unsigned k, const Piece<T, kWidth>& piece) {
        const unsigned statistic = k / (kAtOnce * kVector), v = k / kVector - kAtOnce * statistic;
        const unsigned col = first_col + (first + v) * step + k % kVector;
        if (col < static_cast<unsigned>(cols)) store_piece(out + (statistic * cols + col), piece);
      };
      // Whole warps, or lanes that a warp shares out evenly, of which the block is then full.
      constexpr int kLanes = kYs > 2 ? kThreads / kYs : 0;
      add_met<kWidth, kPack, kAtOnce * kSums * kVector, kThreads, kYs, kLanes>(meet, threads, put);
    };
    if constexpr (!A::kWhole) {
      add(Constant<1>(), Constant<0>());
    } else if (threads.ys < 4) {  // they are powers of two: with == it becomes a table of addresses
      add(Constant<4>(), Constant<2>());
    } else if (threads.ys < 8) {
      add(Constant<4>(), Constant<4>());
    } else if (threads.ys < 16) {
      add(Constant<4>(), Constant<8>());
    } else if (threads.ys < 32) {
      add(Constant<(kVectors > 1 ? 4 : 2)>(), Constant<16>());
    } else if (threads.ys < 64 || kVectors < 3) {
      add(Constant<2>(), Constant<32>());
    } else {
      add(Constant<2>(), Constant<64>());
    }
  }
}

}  // namespace hfac
