// The module hfac._C, and hfac._emulated for the tests. This file and csrc/bindings/ alone know pybind11; no tensor
// library at all.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/items.h"
#ifdef HFAC_EMULATED
#include "emulation/emulation.h"
#else
#include "cpu/level.h"
#endif

namespace py = pybind11;

#ifdef HFAC_EMULATED
PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels of hfac, compiled for the host. For tests.";
  hfac::bindings::define_cuda(m);
  hfac::bindings::define_step_counts(m);
  m.def("set_block_order", &hfac::emulation::set_block_order, py::arg("order"));
  m.def("inject_fault", &hfac::emulation::inject_fault, py::arg("fault"));
  m.def("set_threading", &hfac::emulation::set_threading, py::arg("threading"));
  m.def("inject_error", &hfac::emulation::inject_error, py::kw_only(), py::arg("code"), py::arg("text"),
        py::arg("launches") = 0, "An error of CUDA (a cudaError_t), as if it came after that many more launches.");
  m.def("take_launches", &hfac::emulation::take_launches, "Launches since the last call.");
}
#else

namespace {

py::dict info() {
  py::dict d;
  d["version"] = HFAC_VERSION;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "g++ " __VERSION__;
#endif
#ifdef HFAC_SANITIZE
  d["sanitize"] = HFAC_SANITIZE;
#else
  d["sanitize"] = "";
#endif
  d["isa_compiled"] = hfac::levels(false);
  d["isa_usable"] = hfac::levels(true);
  d["isa"] = hfac::level();
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of hfac. Each op returns the bytes of workspace that it held at most.";
  hfac::bindings::define_cpu(m);
  hfac::bindings::define_snapshots(m);
  hfac::bindings::define_cuda(m);
  hfac::bindings::define_step_counts(m);
  m.def("info", &info, "Version, compiler and instruction sets: compiled, usable on this processor, in use.");
  m.def("set_isa", &hfac::set_level, py::arg("name"),
        "Use a lower instruction set than the best; '' is the best. The results are the same to the bit.");
}
#endif
