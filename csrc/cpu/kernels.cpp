// The kernels of one instruction set. The build compiles this file once per level, with that level's flags and name.
#include "kernels.h"

#include "hfac_int8_kernels.h"
#include "hfac_kernels.h"
#include "rounding_kernels.h"
#include "smmf_kernels.h"

namespace hfac {
namespace HFAC_LEVEL {
namespace {

template <class T, class Sw, class Sg>
constexpr PairKernels<T> pair() {
  return {smmf_rows<T, Sw, Sg>, smmf_dense<T, Sw, Sg>,  hfac_update_all<T, Sw, Sg>,
          hfac_int8<T, Sw, Sg>, hfac_dense_norm<T, Sg>, hfac_dense<T, Sw, Sg>};
}

template <class T, class Sg>
constexpr GradKernels<T> grad() {
  return {hfac_stats<T, Sg>, nonfinite_square<T, Sg>};
}

constexpr Kernels make() {
  constexpr int f32 = static_cast<int>(DType::kFloat32), bf16 = static_cast<int>(DType::kBFloat16),
                f16 = static_cast<int>(DType::kFloat16), f64 = static_cast<int>(DType::kFloat64);
  Kernels k{};
  k.of_float.pairs[f32][f32] = pair<float, float, float>();
  k.of_float.pairs[bf16][bf16] = pair<float, BFloat16, BFloat16>();
#if HFAC_REGISTER > 16  // the plain level stages the rarer pairs: the same bits, and half the time to compile
  k.of_float.pairs[f16][f16] = pair<float, Float16, Float16>();
  k.of_float.pairs[bf16][f32] = pair<float, BFloat16, float>();
  k.of_float.pairs[f32][bf16] = pair<float, float, BFloat16>();
#endif
  k.of_float.grads[f32] = grad<float, float>();
  k.of_float.grads[bf16] = grad<float, BFloat16>();
  k.of_float.grads[f16] = grad<float, Float16>();
  k.of_double.pairs[f64][f64] = pair<double, double, double>();
  k.of_double.grads[f64] = grad<double, double>();
  k.rounding = {draw,
                widen_all<BFloat16>,
                widen_all<Float16>,
                round_all<BFloat16>,
                round_all<Float16>,
                join_all<int16_t>,
                join_all<int8_t>,
                split_all<int16_t>,
                split_all<int8_t>};
  return k;
}

}  // namespace

extern const Kernels kTable;
constexpr Kernels kTable = make();

}  // namespace HFAC_LEVEL
}  // namespace hfac
