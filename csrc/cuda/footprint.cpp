// Blocks, workspaces and bytes of kernels, by shapes and types.
#include "footprint.h"

namespace hfac {

int64_t Footprint::tile_sums(const DeviceItem& it) {
  return padded(state_bytes(it) * kSums * it.tiling.row_tiles * it.cols);
}

int64_t Footprint::workspace_of(const DeviceItem& item) const {
  DeviceItem it = item;
  it.workspace = 0;
  char* const base = reinterpret_cast<char*>(uintptr_t{4096});  // only differences matter
  const auto end_of = [&](auto zero) {
    using T = decltype(zero);
    if (smmf_matrices()) return reinterpret_cast<char*>(SmmfSpace<T>(it, base).end) - base;
    if (is_dense(options_.op)) return reinterpret_cast<char*>(DenseSpace<T>(it, base).end) - base;
    const int64_t without_tiles = reinterpret_cast<char*>(HfacSpace<T>(it, base).end) - base;
    return it.collects ? without_tiles : padded(without_tiles) + tile_sums(it);
  };
  return is_double(it) ? end_of(double()) : end_of(float());
}

std::pair<Access, int64_t> Footprint::cut_for(Kernel kernel, int32_t i) const {
  const DeviceItem& it = item(i);
  const bool bulk = bulk_[static_cast<size_t>(i)];
  switch (kernel) {
    case Kernel::smmf_tiles:
      return {pair_access(it, bulk), tiles_of(it.tiling)};
    case Kernel::hfac_small:
    case Kernel::hfac_int8_small:
      return {pair_access(it, bulk), 1};
    case Kernel::hfac_stats:
      return {grad_access(it, bulk || it.single), tiles_of(it.tiling)};
    case Kernel::hfac_update:
    case Kernel::hfac_int8_update:
      return {pair_access(it, bulk || it.single), tiles_of(it.update)};
    case Kernel::hfac_dense:
    case Kernel::smmf_dense:
      return {pair_access(it, bulk), runs(it)};
    case Kernel::look:
    case Kernel::squares:
    case Kernel::dense_look:
      return {grad_access(it, bulk), runs(it)};
    case Kernel::hfac_collect:
      return {state_access(it), collect_chunks(it)};
    case Kernel::smmf_fold:  // nothing of what is one tile, whose block finishes the factors itself
      return {state_access(it), tiles_of(it.tiling) > 1 ? fold_chunks(it.rows, it.cols, kSmmfChunk) : 0};
    case Kernel::smmf_sums_fold: {
      const DeviceShard& shard = shards_[static_cast<size_t>(i)];
      return {state_access(it), shard.blocks ? fold_chunks(shard.rows, shard.cols, kSmmfChunk) : 0};
    }
    default:
      return {state_access(it), hfac_chunks(it)};
  }
}

void Footprint::count(Kernel kernel, const DeviceItem& it, double cached, Bytes& b) const {
  const int64_t number = state_bytes(it), numbers = number * (it.rows + it.cols), grad = grad_bytes(it);
  const int64_t moments = options_.first_moment ? 2 : 1;
  const int64_t statistics = number * (3 * it.tiling.row_tiles * it.cols + 2 * it.rows);
  switch (kernel) {
    case Kernel::squares:
      b.partial += 2 * runs(it) * int64_t{sizeof(double)};
      [[fallthrough]];
    case Kernel::look:
      b.grad += grad;
      break;
    case Kernel::smmf_tiles:
      b.grad += grad;
      b.param += param_bytes(it);
      if (options_.first_moment) {
        b.signs += 2 * (it.signs.slice ? elements(it) / it.signs.slice * it.signs.slice_bytes : elements(it) / 8);
      }
      if (options_.op == OpKind::kSmmf && tiles_of(it.tiling) == 1) {
        b.states += 2 * moments * numbers;
        break;
      }
      [[fallthrough]];  // both write or read the partial sums, and read or write the factors
    case Kernel::smmf_fold:
    case Kernel::smmf_sums_fold:
      b.partial += number * moments * (it.tiling.col_tiles * it.rows + it.tiling.row_tiles * it.cols);
      b.partial += number * moments * tiles_of(it.tiling);
      b.states += moments * numbers;
      break;
    case Kernel::hfac_small:
      b.grad += grad;
      b.param += param_bytes(it);
      b.states += 4 * numbers;
      break;
    case Kernel::hfac_int8_small:
      b.grad += grad;
      b.param += param_bytes(it);
      b.states += 2 * numbers + 2 * elements(it);
      break;
    case Kernel::hfac_stats:
      b.grad += grad;
      b.partial += statistics;
      if (width_of(it, grad_access(it, true)) == Width::kWide) {  // whose column sums are in memory as they grow
        b.partial += number * 2 * 3 * it.cols * ceil_quotient(it.rows, kWideRows);
      }
      b.states += number * it.rows;
      break;
    case Kernel::hfac_collect:
      b.partial += number * 3 * (it.tiling.row_tiles + 1) * it.cols;
      break;
    case Kernel::hfac_fold:
    case Kernel::hfac_int8_fold:
      b.partial += options_.norm ? number * (3 * it.cols + 2 * it.rows) : statistics;
      b.states += codes() ? 2 * numbers : number * (3 * it.rows + 4 * it.cols);
      break;
    case Kernel::hfac_sums_fold:
      b.partial += statistics;
      b.states += number * (2 * it.rows + 3 * it.cols);
      break;
    case Kernel::hfac_apply_fold:
      b.states += 6 * numbers;
      break;
    case Kernel::hfac_int8_apply_fold:
      b.states += 4 * numbers;
      break;
    case Kernel::hfac_int8_update:
      b.states += 2 * elements(it);
      [[fallthrough]];
    case Kernel::hfac_update: {
      const auto again = static_cast<int64_t>(cached * static_cast<double>(grad));
      b.grad += grad - again;
      b.grad_again += again;
      b.param += param_bytes(it);
      b.partial += 2 * numbers;
      break;
    }
    case Kernel::dense_look:
      b.grad += grad;
      b.states += number * elements(it);
      b.partial += number * 2 * runs(it);
      break;
    case Kernel::hfac_dense:
    case Kernel::smmf_dense:
      b.grad += grad;
      b.param += param_bytes(it);
      b.states += number * elements(it) * 2 * moments;
  }
}

}  // namespace hfac
