// The counts of steps on the device as Python sees them.
#include "items.h"
#ifdef HFAC_CUDA_STEP
#include "../cuda/step_counts.h"
#endif

namespace hfac {
namespace bindings {

#ifdef HFAC_CUDA_STEP
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DecayRule rule_of(const std::string& name) {
  if (name == "hfac") return DecayRule::kHfac;
  if (name == "smmf") return DecayRule::kSmmf;
  refuse("rule", "'hfac' or 'smmf' is needed, not '" + name + "'");
}

}  // namespace
#endif

void define_step_counts(py::module_& m) {
#ifdef HFAC_CUDA_STEP
  // Of this module alone: hfac._C and hfac._emulated each have one, in one process where tests run.
  py::class_<StepCounts>(m, "StepCounts", py::module_local(),
                         "Steps of parameters that the device counts: float32 `made` and int32 `skipped` (0: none can "
                         "be), `count` of each, by address.")
      .def(py::init([](uintptr_t made, uintptr_t skipped, int64_t count) {
             if (count < 0) refuse("count", "negative: " + std::to_string(count));
             if (count && !made) refuse("made", "a null address");
             return StepCounts{at<float>(made), at<int32_t>(skipped), count};
           }),
           py::arg("made"), py::arg("skipped"), py::arg("count"))
      .def(
          "decays",
          [](const StepCounts& counts, const std::string& rule, double first, double second, double growth,
             uintptr_t to, int device, uintptr_t stream) {
            const Decays decays{rule_of(rule), first, second, growth};
            if (counts.count && !to) refuse("to", "a null address");
            const py::gil_scoped_release release;
            launch_decays(counts, decays, at<double>(to), device, at<void>(stream));
          },
          py::arg("rule"), py::arg("first"), py::arg("second"), py::arg("growth"), py::arg("to"), py::arg("device") = 0,
          py::arg("stream") = 0,
          "Writes float64 [3, count] for the steps that follow: decays of both moments, and the steps' numbers.")
      .def(
          "add",
          [](const StepCounts& counts, uintptr_t nonfinite, int device, uintptr_t stream) {
            if (nonfinite && !counts.skipped) refuse("nonfinite", "no step can be skipped here");
            const py::gil_scoped_release release;
            launch_count(counts, at<int32_t>(nonfinite), device, at<void>(stream));
          },
          py::arg("nonfinite"), py::arg("device") = 0, py::arg("stream") = 0,
          "Counts a step of each parameter, as skipped where its flag (int32, 0: there are none) is up.");
#else
  (void)m;
#endif
}

}  // namespace bindings
}  // namespace hfac
