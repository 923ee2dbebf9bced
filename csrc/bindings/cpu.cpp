// The CPU kernels' part of the module: keyword arguments in, checked structs out.
#include <algorithm>
#include <optional>

#include "../cpu/ops.h"
#include "arguments.h"
#include "modules.h"

namespace hfac {
namespace bindings {
namespace {

int32_t* flags(uintptr_t address, py::ssize_t size) {
  auto* out = reinterpret_cast<int32_t*>(address);
  if (out) std::fill_n(out, size, 0);
  return out;
}

int at_least_one(int threads) {
  if (threads < 1) refuse("threads", "at least 1, not " + std::to_string(threads));
  return threads;
}

template <class Step>
size_t unlocked(const Step& step) {
  py::gil_scoped_release release;
  return step();
}

size_t hfac_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                 py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                 py::object exp_avg_cols, py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object beta1,
                 py::object beta2, double lr, double eps, std::optional<double> clip_threshold, double weight_decay,
                 bool maximize, uintptr_t nonfinite, int threads, py::object shapes, py::object param_strides,
                 py::object grad_strides) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides);
  const py::ssize_t size = operands.size();
  const List m(rows, "rows", size), n(cols, "cols", size);
  const List u(exp_avg_rows, "exp_avg_rows", size), v(exp_avg_cols, "exp_avg_cols", size);
  const List r(exp_avg_sq_rows, "exp_avg_sq_rows", size), s(exp_avg_sq_cols, "exp_avg_sq_cols", size);
  const PerParameter b1(beta1, "beta1", size), b2(beta2, "beta2", size);
  std::vector<HfacItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (matrix(m, n, i, operands.numel(i)) == 0) continue;
    items.push_back({i, operands.param(i), operands.grad(i), m.count(i), n.count(i), u.address(i, true),
                     v.address(i, true), r.address(i, true), s.address(i, true), b1.number(i), b2.number(i)});
  }
  const HfacOptions options{lr,
                                  eps,
                                  clip_threshold.value_or(1.0),
                                  weight_decay,
                                  clip_threshold.has_value(),
                                  maximize,
                                  flags(nonfinite, size),
                                  at_least_one(threads)};
  return unlocked([&] { return hfac::hfac_step(items, options); });
}

std::vector<DenseItem> dense_items(Operands& operands, const py::object& exp_avgs, const py::object& exp_avg_sqs,
                                         const py::object& beta1, const py::object& beta2) {
  const py::ssize_t size = operands.size();
  const List q(exp_avg_sqs, "exp_avg_sqs", size);
  const PerParameter b1(beta1.is_none() ? py::float_(0.0) : beta1, "beta1", size), b2(beta2, "beta2", size);
  std::vector<DenseItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (operands.numel(i) == 0) continue;
    items.push_back({i, operands.param(i), operands.grad(i), operands.numel(i), optional(exp_avgs, "exp_avgs", size, i),
                     q.address(i, true), b1.number(i), b2.number(i)});
  }
  return items;
}

size_t hfac_dense_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                       py::object grad_dtypes, py::object exp_avgs, py::object exp_avg_sqs, py::object beta1,
                       py::object beta2, double lr, double eps, std::optional<double> clip_threshold,
                       double weight_decay, bool maximize, uintptr_t nonfinite, int threads, py::object shapes,
                       py::object param_strides, py::object grad_strides) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides);
  if (exp_avgs.is_none()) refuse("exp_avgs", "a list is needed, not None");
  const auto items = dense_items(operands, exp_avgs, exp_avg_sqs, beta1, beta2);
  const HfacOptions options{lr,
                                  eps,
                                  clip_threshold.value_or(1.0),
                                  weight_decay,
                                  clip_threshold.has_value(),
                                  maximize,
                                  flags(nonfinite, operands.size()),
                                  at_least_one(threads)};
  return unlocked([&] { return hfac::hfac_dense_step(items, options); });
}

size_t smmf_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                 py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                 py::object exp_avg_cols, py::object exp_avg_signs, py::object sign_bytes, py::object sign_slices,
                 py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object beta1, py::object beta2, double lr,
                 double eps, double weight_decay, bool decoupled_weight_decay, bool maximize, uintptr_t nonfinite,
                 int threads, py::object shapes, py::object param_strides, py::object grad_strides) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides);
  const py::ssize_t size = operands.size();
  const bool first = !beta1.is_none();
  const py::object none = py::make_tuple();
  const py::ssize_t moments = first ? size : 0;
  const List n(rows, "rows", size), m(cols, "cols", size);
  const List r_m(first ? exp_avg_rows : none, "exp_avg_rows", moments),
      c_m(first ? exp_avg_cols : none, "exp_avg_cols", moments);
  const List bits(first ? exp_avg_signs : none, "exp_avg_signs", moments);
  const List bytes(first ? sign_bytes : none, "sign_bytes", moments);
  const bool sliced = first && !sign_slices.is_none();
  const List slices(sliced ? sign_slices : none, "sign_slices", sliced ? size : 0);
  const List r_v(exp_avg_sq_rows, "exp_avg_sq_rows", size), c_v(exp_avg_sq_cols, "exp_avg_sq_cols", size);
  const PerParameter b1(first ? beta1 : py::float_(0.0), "beta1", size), b2(beta2, "beta2", size);
  std::vector<SmmfItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    const int64_t numel = operands.numel(i);
    if (matrix(n, m, i, numel) == 0) continue;
    SmmfItem item{i,  operands.param(i),    operands.grad(i),     n.count(i),   m.count(i),  nullptr, nullptr,
                        {}, r_v.address(i, true), c_v.address(i, true), b1.number(i), b2.number(i)};
    if (first) {
      item.exp_avg_row = r_m.address(i, true);
      item.exp_avg_col = c_m.address(i, true);
      item.signs = signs(bits.address(i, true), bytes.count(i), sliced ? slices.count(i) : 0, numel, i);
    }
    items.push_back(item);
  }
  const SmmfOptions options{
      lr, eps, weight_decay, !decoupled_weight_decay, maximize, flags(nonfinite, size), at_least_one(threads)};
  return unlocked([&] { return hfac::smmf_step(items, options); });
}

size_t smmf_dense_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                       py::object grad_dtypes, py::object exp_avgs, py::object exp_avg_sqs, py::object beta1,
                       py::object beta2, double lr, double eps, double weight_decay, bool decoupled_weight_decay,
                       bool maximize, uintptr_t nonfinite, int threads, py::object shapes, py::object param_strides,
                       py::object grad_strides) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides);
  if (beta1.is_none()) exp_avgs = py::none();
  if (!beta1.is_none() && exp_avgs.is_none()) refuse("exp_avgs", "a list is needed where beta1 is given");
  const auto items = dense_items(operands, exp_avgs, exp_avg_sqs, beta1, beta2);
  const SmmfOptions options{lr,
                                  eps,
                                  weight_decay,
                                  !decoupled_weight_decay,
                                  maximize,
                                  flags(nonfinite, operands.size()),
                                  at_least_one(threads)};
  return unlocked([&] { return hfac::smmf_dense_step(items, options); });
}

py::list read_floats(const py::object& addresses) {
  const List list(addresses, "addresses", -1);
  py::list out(static_cast<size_t>(list.size()));
  for (py::ssize_t i = 0; i < list.size(); ++i) {
    out[static_cast<size_t>(i)] = py::float_(static_cast<double>(*static_cast<const float*>(list.address(i, true))));
  }
  return out;
}

void advance_floats(const py::object& addresses) {
  const List list(addresses, "addresses", -1);
  for (py::ssize_t i = 0; i < list.size(); ++i) list.address(i, true);  // all of them, before the first is written
  for (py::ssize_t i = 0; i < list.size(); ++i) *static_cast<float*>(list.address(i, true)) += 1.0f;
}

}  // namespace

#define HFAC_OPERANDS \
  py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("numels"), py::arg("param_dtypes"), py::arg("grad_dtypes")
#define HFAC_PLACES                                                                 \
  py::arg("nonfinite") = 0, py::arg("threads") = 1, py::arg("shapes") = py::none(), \
  py::arg("param_strides") = py::none(), py::arg("grad_strides") = py::none()

void define_cpu(py::module_& m) {
  m.def("hfac_step", &hfac_step, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("exp_avg_rows"),
        py::arg("exp_avg_cols"), py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("beta1"),
        py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("clip_threshold"), py::arg("weight_decay"),
        py::arg("maximize"), HFAC_PLACES);
  m.def("hfac_dense_step", &hfac_dense_step, HFAC_OPERANDS, py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("beta1"), py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("clip_threshold"),
        py::arg("weight_decay"), py::arg("maximize"), HFAC_PLACES);
  m.def("smmf_step", &smmf_step, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("exp_avg_rows"),
        py::arg("exp_avg_cols"), py::arg("exp_avg_signs"), py::arg("sign_bytes"), py::arg("sign_slices"),
        py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("beta1"), py::arg("beta2"), py::arg("lr"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled_weight_decay"), py::arg("maximize"), HFAC_PLACES);
  m.def("smmf_dense_step", &smmf_dense_step, HFAC_OPERANDS, py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("beta1"), py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("decoupled_weight_decay"), py::arg("maximize"), HFAC_PLACES);
  m.def("read_floats", &read_floats, py::arg("addresses"), "The float at each address.");
  m.def("advance_floats", &advance_floats, py::arg("addresses"), "Adds one to the float at each address.");
}

}  // namespace bindings
}  // namespace hfac
