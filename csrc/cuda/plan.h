// From shapes and types to launches: which kernels run over which tiles, in which order, and the bytes each moves.
// Plain C++: it can be asked without a GPU, and the launcher follows the same object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "table.h"

namespace hfac {

enum class OpKind { kHfac, kHfacDense, kSmmf, kSmmfDense, kHfacSums, kHfacApply, kSmmfSums };
enum class Kernel {
  kLook,
  kSmmfTiles,
  kSmmfFold,
  kSmmfSumsFold,
  kHfacStats,
  kHfacCollect,
  kHfacFold,
  kHfacSumsFold,
  kHfacApplyFold,
  kHfacUpdate,
  kDenseLook,
  kHfacDense,
  kSmmfDense
};

// How a kernel reaches its elements: types known when it was compiled and 16-byte accesses, or anything at all. The
// later ones store more than one rounding to the nearest: bfloat16 stochastically, or with 16 or 8 bits beside it, each
// also with float gradients; or anything at all.
enum class Access {
  kFloat,
  kBFloat16,
  kFloat16,
  kBFloat16Float,
  kFloatBFloat16,
  kAny,
  kDouble,
  kDrawn,
  kDrawnFloat,
  kSplit,
  kSplitFloat,
  kSplit8,
  kSplit8Float,
  kStored
};
constexpr int kAccesses = static_cast<int>(Access::kStored) + 1;
// Row lengths of H-Fac's statistics: held in registers, read again from L1, sums in memory.
enum class Width { kNarrow, kRegisters, kWide };

// A plan has one phase, the step; H-Fac's with `norm` takes all statistics before, for the norm of all gradients.
enum class Phase { kStep, kSquares };

struct PlanOptions {
  OpKind op;
  bool first = true;       // SMMF: there is a first moment
  bool clip = true;        // H-Fac
  bool nonfinite = false;  // gradients may be refused
  bool norm = false;       // H-Fac: statistics in a phase of their own
  int64_t l2_bytes = 50 << 20;
  double l2_share = 0.6;  // of which a group's gradients may fill
};

struct Bytes {
  int64_t grad = 0, grad_again = 0;  // again: found in the L2 cache
  int64_t param_read = 0, param_written = 0, signs = 0, partial = 0, states = 0;
  int64_t from_memory() const { return grad + param_read + param_written + signs + partial + states; }
};

struct Launch {
  Kernel kernel;
  Access access;
  Width width;
  int group;
  Phase phase;
  bool conditional;  // runs only where gradients are clipped by their norm; its bytes are those that it then moves
  bool backward;
  int threads;
  int64_t first_tile, tiles;  // one block each
  Bytes bytes;
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<Tile> tiles;
  size_t workspace_bytes = 0;
};

// `bulk[i]`: contiguous and aligned, rows and signs in whole vectors; `parts`: as many as items where the op is one on
// parts. Sets each item's tiling, places in the workspace, and counter.
Plan make_plan(std::vector<Item>& items, const std::vector<bool>& bulk, const PlanOptions& options,
               const std::vector<Part>& parts = {});

// For a list that exists in shapes only: everything contiguous and aligned.
std::vector<bool> assumed_bulk(const std::vector<Item>& items);

const char* name_of(Kernel kernel);
const char* name_of(Access access);
const char* name_of(Width width);
const char* name_of(Phase phase);

}  // namespace hfac
