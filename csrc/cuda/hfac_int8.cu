// The update of H-Fac whose first moment is whole, in codes of 8 bits. Its statistics are hfac_stats.cu's, its fold is
// in hfac.cu.
#include "hfac_update.cuh"

namespace hfac {
namespace {

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) hfac_int8_tiles(Arguments a) {
  update_tile<A, kWatched, true>(a);
}

}  // namespace

KernelFunction hfac_int8_update_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, PairAccesses, hfac_int8_tiles);
}

}  // namespace hfac
