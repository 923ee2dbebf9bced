// What the modules are put together from.
#pragma once

#include <pybind11/pybind11.h>

namespace hfac {
namespace bindings {

void define_cpu(pybind11::module_& m);
void define_cuda(pybind11::module_& m);

}  // namespace bindings
}  // namespace hfac
