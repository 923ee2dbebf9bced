// From shapes and types to launches: which kernels run over which tiles, in which order, and the bytes each moves.
// Plain C++: it can be asked without a GPU, and the launcher follows the same object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "access.h"
#include "table.h"

namespace hfac {

// Every kernel that a plan can have. csrc/cuda/*.cu define <name>_kernel, which picks the instantiation for a launch.
#define HFAC_KERNELS(KERNEL) \
  KERNEL(look)               \
  KERNEL(squares)            \
  KERNEL(smmf_tiles)         \
  KERNEL(smmf_fold)          \
  KERNEL(smmf_sums_fold)     \
  KERNEL(hfac_small)         \
  KERNEL(hfac_int8_small)    \
  KERNEL(hfac_stats)         \
  KERNEL(hfac_collect)       \
  KERNEL(hfac_fold)          \
  KERNEL(hfac_sums_fold)     \
  KERNEL(hfac_apply_fold)    \
  KERNEL(hfac_update)        \
  KERNEL(hfac_int8_fold)     \
  KERNEL(hfac_int8_apply_fold) KERNEL(hfac_int8_update) KERNEL(dense_look) KERNEL(hfac_dense) KERNEL(smmf_dense)
#define HFAC_ENUMERATOR(name) name,
enum class Kernel { HFAC_KERNELS(HFAC_ENUMERATOR) };
#undef HFAC_ENUMERATOR

// A plan has one phase, the step; with `norm` another comes before, for the norm of all gradients: H-Fac's takes all
// statistics in it, others' only add up squares.
enum class Phase { kStep, kSquares };

struct PlanOptions {
  OpKind op;
  bool first_moment = true;  // SMMF
  bool clip = true;          // H-Fac
  bool nonfinite = false;    // gradients may be refused
  bool norm = false;         // sums of squares in a phase of their own, with H-Fac's statistics
  int64_t l2_bytes = 50 << 20;
  double l2_share = 0.6;  // of which a group's gradients may fill
};

struct Bytes {
  int64_t grad = 0, grad_again = 0;  // again: found in the L2 cache
  int64_t param = 0;                 // read, and as many written
  int64_t signs = 0, partial = 0, states = 0;
  int64_t from_memory() const { return grad + 2 * param + signs + partial + states; }
};

struct Launch {
  Kernel kernel;
  Access access;
  Width width;
  int group;
  Phase phase;
  bool conditional;  // runs only where gradients are clipped by their norm; its bytes are those that it then moves
  bool backward;
  int threads, shared;  // of a block; bytes of dynamic shared memory
  // One block for each tile, but for SMMF's first ones, which have a tile for each warp.
  int64_t first_tile, blocks, small_blocks;
  Bytes bytes;
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<Tile> tiles;
  size_t workspace_bytes = 0;
};

// `bulk[i]`: contiguous and aligned, rows and signs in whole vectors; `shards`: as many as items where the op is one on
// shards. Sets each item's tiling, offsets in the workspace, and counter.
Plan make_plan(std::vector<DeviceItem>& items, const std::vector<bool>& bulk, const PlanOptions& options,
               const std::vector<DeviceShard>& shards = {});

// Are both moments whole?
bool is_dense(OpKind op);

// Do an item's rows, and its signs, consist of whole vectors?
bool in_vectors(const DeviceItem& it, OpKind op);

// For a list that exists in shapes only: everything contiguous and aligned.
std::vector<bool> assumed_bulk(const std::vector<DeviceItem>& items, OpKind op);

const char* name_of(Kernel kernel);
const char* name_of(Phase phase);

}  // namespace hfac
