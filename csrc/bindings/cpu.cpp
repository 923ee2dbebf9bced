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

HfacStage stage_of(const std::string& name) {
  if (name == "whole") return HfacStage::kWhole;
  if (name == "statistics") return HfacStage::kStatistics;
  if (name == "rest") return HfacStage::kRest;
  refuse("stage", "'whole', 'statistics' or 'rest' is needed, not '" + name + "'");
}

size_t hfac_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                 py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                 py::object exp_avg_cols, py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object beta1,
                 py::object beta2, double lr, double eps, std::optional<double> clip_threshold, double weight_decay,
                 bool maximize, uintptr_t nonfinite, uintptr_t watched, int threads, py::object shapes,
                 py::object param_strides, py::object grad_strides, const std::string& stage, uintptr_t kept,
                 uintptr_t squares, const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  const py::ssize_t size = operands.size();
  HfacOptions options{lr,       eps,     clip_threshold.value_or(1.0), weight_decay, clip_threshold.has_value(),
                      maximize, nullptr, at_least_one(threads)};
  options.stage = stage_of(stage);
  const bool whole = options.stage == HfacStage::kWhole, rest = options.stage == HfacStage::kRest;
  if (!whole && size > 0 && !kept) refuse("kept", "a null address where a step is made in two calls");
  options.squares = reinterpret_cast<double*>(squares);
  options.watched = reinterpret_cast<double*>(watched);
  if (!whole && !rest && size > 0 && !squares) refuse("squares", "a null address where statistics are taken");
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
    if (whole) continue;
    items.back().kept = reinterpret_cast<void*>(kept);
    kept += hfac_kept_bytes(m.count(i), n.count(i), items.back().param.dtype == DType::kFloat64);
  }
  options.nonfinite = rest ? reinterpret_cast<int32_t*>(nonfinite) : flags(nonfinite, size);
  return unlocked([&] { return hfac::hfac_step(items, options); });
}

// Bytes of `kept` for a step in two calls.
size_t hfac_kept(py::object rows, py::object cols, py::object param_dtypes) {
  const List m(rows, "rows", -1), n(cols, "cols", m.size());
  const PerParameter dtypes(param_dtypes, "param_dtypes", m.size());
  size_t bytes = 0;
  for (py::ssize_t i = 0; i < m.size(); ++i) {
    if (product(m.count(i), n.count(i), "rows") == 0) continue;
    bytes += hfac_kept_bytes(m.count(i), n.count(i), dtypes.dtype(i) == DType::kFloat64);
  }
  return bytes;
}

size_t hfac_sums(py::object grads, py::object numels, py::object grad_dtypes, py::object state_dtypes, py::object rows,
                 py::object whole_cols, py::object old_rows, py::object row_sums, py::object new_rows,
                 py::object col_sums, py::object col_squares, py::object col_ratios, py::object beta2, double eps,
                 int threads, py::object shapes, py::object grad_strides) {
  const List counts(numels, "numels", -1);
  const py::ssize_t size = counts.size();
  Tensors tensors(grads, "grads", size, grad_dtypes, "grad_dtypes", grad_strides, "grad_strides");
  const PerParameter dtypes(state_dtypes, "state_dtypes", size), b2(beta2, "beta2", size);
  const List m(rows, "rows", size), whole(whole_cols, "whole_cols", size);
  const List old(old_rows, "old_rows", size), sums(row_sums, "row_sums", size), r(new_rows, "new_rows", size);
  if (col_sums.is_none() != col_squares.is_none()) refuse("col_squares", "needed exactly where col_sums is given");
  if (col_sums.is_none() != col_ratios.is_none()) refuse("col_ratios", "needed exactly where col_sums is given");
  std::vector<HfacSumsItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    const int64_t numel = counts.count(i), height = m.count(i), width = whole.count(i);
    if (numel == 0) continue;
    if (height == 0 || numel % height != 0) {
      m.bad(i, "no divisor of the part's " + std::to_string(numel) + " elements: " + std::to_string(height));
    }
    const DType state = dtypes.dtype(i);
    if (state != DType::kFloat32 && state != DType::kFloat64) refuse("state_dtypes", "float32 or float64 is needed");
    items.push_back({tensors.at(i, counts, shapes), state == DType::kFloat64, height, numel / height, width,
                     old.address(i, true), sums.address(i, true), r.address(i, true),
                     optional(col_sums, "col_sums", size, i), optional(col_squares, "col_squares", size, i),
                     optional(col_ratios, "col_ratios", size, i), b2.number(i)});
  }
  const int workers = at_least_one(threads);
  return unlocked([&] { return hfac::hfac_sums(items, eps, workers); });
}

size_t hfac_apply(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                  py::object grad_dtypes, py::object rows, py::object cols, py::object whole_rows,
                  py::object whole_cols, py::object exp_avg_rows, py::object exp_avg_cols, py::object exp_avg_sq_rows,
                  py::object exp_avg_sq_cols, py::object row_sums, py::object new_rows, py::object col_sums,
                  py::object new_cols, py::object totals, py::object mean_squares, py::object beta1, double lr,
                  std::optional<double> clip_threshold, double weight_decay, bool maximize, int threads,
                  py::object shapes, py::object param_strides, py::object grad_strides, const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  const py::ssize_t size = operands.size();
  const List m(rows, "rows", size), n(cols, "cols", size);
  const List whole_m(whole_rows, "whole_rows", size), whole_n(whole_cols, "whole_cols", size);
  const List u(exp_avg_rows, "exp_avg_rows", size), v(exp_avg_cols, "exp_avg_cols", size);
  const List r(exp_avg_sq_rows, "exp_avg_sq_rows", size), s(exp_avg_sq_cols, "exp_avg_sq_cols", size);
  const List row_sum(row_sums, "row_sums", size), new_row(new_rows, "new_rows", size);
  const List col_sum(col_sums, "col_sums", size), new_col(new_cols, "new_cols", size);
  const List total(totals, "totals", size), mean_square(mean_squares, "mean_squares", size);
  const PerParameter b1(beta1, "beta1", size);
  std::vector<HfacPart> parts;
  std::vector<HfacItem> items;
  parts.reserve(static_cast<size_t>(size));  // items point at its entries
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    const bool empty = matrix(m, n, i, operands.numel(i)) == 0;
    const bool tall = m.count(i) > 0, broad = n.count(i) > 0;
    parts.push_back({row_sum.address(i, tall), new_row.address(i, tall), col_sum.address(i, broad),
                     new_col.address(i, broad), whole_m.count(i), whole_n.count(i), total.number(i),
                     mean_square.number(i)});
    items.push_back({i, operands.param(i, empty), operands.grad(i, empty), m.count(i), n.count(i), u.address(i, tall),
                     v.address(i, broad), r.address(i, tall), s.address(i, broad), b1.number(i), 0.0, &parts.back()});
  }
  const HfacOptions options{lr,       0.0,     clip_threshold.value_or(1.0), weight_decay, clip_threshold.has_value(),
                            maximize, nullptr, at_least_one(threads)};
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
                       double weight_decay, bool maximize, uintptr_t nonfinite, uintptr_t watched, int threads,
                       py::object shapes, py::object param_strides, py::object grad_strides,
                       const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  if (exp_avgs.is_none()) refuse("exp_avgs", "a list is needed, not None");
  const auto items = dense_items(operands, exp_avgs, exp_avg_sqs, beta1, beta2);
  const HfacOptions options{lr,
                            eps,
                            clip_threshold.value_or(1.0),
                            weight_decay,
                            clip_threshold.has_value(),
                            maximize,
                            flags(nonfinite, operands.size()),
                            at_least_one(threads),
                            reinterpret_cast<double*>(watched)};
  return unlocked([&] { return hfac::hfac_dense_step(items, options); });
}

// SMMF's matrices, their factors and signs. Without a first moment its lists are not looked at.
class SmmfMatrices {
 public:
  SmmfMatrices(py::ssize_t size, const py::object& rows, const py::object& cols, const py::object& exp_avg_rows,
               const py::object& exp_avg_cols, const py::object& exp_avg_signs, const py::object& sign_bytes,
               const py::object& sign_slices, const py::object& exp_avg_sq_rows, const py::object& exp_avg_sq_cols,
               const py::object& beta1, const py::object& beta2)
      : n(rows, "rows", size),
        m(cols, "cols", size),
        first_(!beta1.is_none()),
        sliced_(first_ && !sign_slices.is_none()),
        r_m_(first_ ? exp_avg_rows : none(), "exp_avg_rows", first_ ? size : 0),
        c_m_(first_ ? exp_avg_cols : none(), "exp_avg_cols", first_ ? size : 0),
        bits_(first_ ? exp_avg_signs : none(), "exp_avg_signs", first_ ? size : 0),
        bytes_(first_ ? sign_bytes : none(), "sign_bytes", first_ ? size : 0),
        slices_(sliced_ ? sign_slices : none(), "sign_slices", sliced_ ? size : 0),
        r_v_(exp_avg_sq_rows, "exp_avg_sq_rows", size),
        c_v_(exp_avg_sq_cols, "exp_avg_sq_cols", size),
        b1_(first_ ? beta1 : py::float_(0.0), "beta1", size),
        b2_(beta2, "beta2", size) {}

  SmmfItem at(py::ssize_t i, Operands& operands) const {
    SmmfItem item{i,  operands.param(i),     operands.grad(i),      n.count(i),    m.count(i),   nullptr, nullptr,
                  {}, r_v_.address(i, true), c_v_.address(i, true), b1_.number(i), b2_.number(i)};
    if (first_) {
      item.exp_avg_row = r_m_.address(i, true);
      item.exp_avg_col = c_m_.address(i, true);
      item.signs = signs(bits_.address(i, true), bytes_.count(i), sliced_ ? slices_.count(i) : 0, operands.numel(i), i);
    }
    return item;
  }

  const List n, m;

 private:
  static py::object none() { return py::make_tuple(); }

  bool first_, sliced_;
  List r_m_, c_m_, bits_, bytes_, slices_, r_v_, c_v_;
  PerParameter b1_, b2_;
};

size_t smmf_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                 py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                 py::object exp_avg_cols, py::object exp_avg_signs, py::object sign_bytes, py::object sign_slices,
                 py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object beta1, py::object beta2, double lr,
                 double eps, double weight_decay, bool decoupled_weight_decay, bool maximize, uintptr_t nonfinite,
                 uintptr_t watched, int threads, py::object shapes, py::object param_strides, py::object grad_strides,
                 const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  const py::ssize_t size = operands.size();
  const SmmfMatrices matrices(size, rows, cols, exp_avg_rows, exp_avg_cols, exp_avg_signs, sign_bytes, sign_slices,
                              exp_avg_sq_rows, exp_avg_sq_cols, beta1, beta2);
  std::vector<SmmfItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (matrix(matrices.n, matrices.m, i, operands.numel(i)) > 0) items.push_back(matrices.at(i, operands));
  }
  const SmmfOptions options{lr,
                            eps,
                            weight_decay,
                            !decoupled_weight_decay,
                            maximize,
                            flags(nonfinite, size),
                            at_least_one(threads),
                            reinterpret_cast<double*>(watched)};
  return unlocked([&] { return hfac::smmf_step(items, options); });
}

size_t smmf_sums_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                      py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                      py::object exp_avg_cols, py::object exp_avg_signs, py::object sign_bytes, py::object sign_slices,
                      py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object new_rows, py::object new_cols,
                      py::object new_sq_rows, py::object new_sq_cols, py::object blocks, py::object beta1,
                      py::object beta2, double lr, double eps, double weight_decay, bool decoupled_weight_decay,
                      bool maximize, int threads, py::object shapes, py::object param_strides, py::object grad_strides,
                      const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  const py::ssize_t size = operands.size();
  const SmmfMatrices matrices(size, rows, cols, exp_avg_rows, exp_avg_cols, exp_avg_signs, sign_bytes, sign_slices,
                              exp_avg_sq_rows, exp_avg_sq_cols, beta1, beta2);
  const bool first = !beta1.is_none();
  if (first && new_rows.is_none()) refuse("new_rows", "a list is needed where beta1 is given");
  if (first && new_cols.is_none()) refuse("new_cols", "a list is needed where beta1 is given");
  const List lists(blocks, "blocks", size), r_v(new_sq_rows, "new_sq_rows", size),
      c_v(new_sq_cols, "new_sq_cols", size);
  std::vector<SmmfSumsItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (operands.numel(i) == 0) continue;
    SmmfSumsItem item{matrices.at(i, operands), {}, nullptr, nullptr, r_v.address(i, true), c_v.address(i, true)};
    item.blocks = bindings::blocks(lists[i], operands.numel(i), item.rows, item.cols);
    if (first) {
      item.new_row = optional(new_rows, "new_rows", size, i);
      item.new_col = optional(new_cols, "new_cols", size, i);
    }
    items.push_back(std::move(item));
  }
  const SmmfOptions options{lr, eps, weight_decay, !decoupled_weight_decay, maximize, nullptr, at_least_one(threads)};
  return unlocked([&] { return hfac::smmf_sums_step(items, options); });
}

size_t smmf_dense_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                       py::object grad_dtypes, py::object exp_avgs, py::object exp_avg_sqs, py::object beta1,
                       py::object beta2, double lr, double eps, double weight_decay, bool decoupled_weight_decay,
                       bool maximize, uintptr_t nonfinite, uintptr_t watched, int threads, py::object shapes,
                       py::object param_strides, py::object grad_strides, const py::kwargs& storing) {
  Operands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides, storing);
  if (beta1.is_none()) exp_avgs = py::none();
  if (!beta1.is_none() && exp_avgs.is_none()) refuse("exp_avgs", "a list is needed where beta1 is given");
  const auto items = dense_items(operands, exp_avgs, exp_avg_sqs, beta1, beta2);
  const SmmfOptions options{lr,
                            eps,
                            weight_decay,
                            !decoupled_weight_decay,
                            maximize,
                            flags(nonfinite, operands.size()),
                            at_least_one(threads),
                            reinterpret_cast<double*>(watched)};
  return unlocked([&] { return hfac::smmf_dense_step(items, options); });
}

size_t squares(py::object grads, py::object numels, py::object grad_dtypes, uintptr_t sums, int threads,
               py::object shapes, py::object grad_strides) {
  const List counts(numels, "numels", -1);
  const py::ssize_t size = counts.size();
  Tensors tensors(grads, "grads", size, grad_dtypes, "grad_dtypes", grad_strides, "grad_strides");
  if (size > 0 && !sums) refuse("sums", "a null address");
  std::vector<SquaresItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (counts.count(i) > 0) items.push_back({i, tensors.at(i, counts, shapes), counts.count(i)});
  }
  const int workers = at_least_one(threads);
  return unlocked([&] { return hfac::squares(items, reinterpret_cast<double*>(sums), workers); });
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
#define HFAC_PLACES                                                                              \
  py::arg("threads") = 1, py::arg("shapes") = py::none(), py::arg("param_strides") = py::none(), \
  py::arg("grad_strides") = py::none()
#define HFAC_FLAGS py::arg("nonfinite") = 0, py::arg("watched") = 0

void define_cpu(py::module_& m) {
  m.def("hfac_step", &hfac_step, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("exp_avg_rows"),
        py::arg("exp_avg_cols"), py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("beta1"),
        py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("clip_threshold"), py::arg("weight_decay"),
        py::arg("maximize"), HFAC_FLAGS, HFAC_PLACES, py::arg("stage") = "whole", py::arg("kept") = 0,
        py::arg("squares") = 0);
  m.def("hfac_kept", &hfac_kept, py::kw_only(), py::arg("rows"), py::arg("cols"), py::arg("param_dtypes"),
        "Bytes that hfac_step keeps between stage='statistics' and stage='rest'.");
  m.def("hfac_dense_step", &hfac_dense_step, HFAC_OPERANDS, py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("beta1"), py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("clip_threshold"),
        py::arg("weight_decay"), py::arg("maximize"), HFAC_FLAGS, HFAC_PLACES);
  m.def("smmf_step", &smmf_step, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("exp_avg_rows"),
        py::arg("exp_avg_cols"), py::arg("exp_avg_signs"), py::arg("sign_bytes"), py::arg("sign_slices"),
        py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("beta1"), py::arg("beta2"), py::arg("lr"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled_weight_decay"), py::arg("maximize"), HFAC_FLAGS,
        HFAC_PLACES);
  m.def("smmf_dense_step", &smmf_dense_step, HFAC_OPERANDS, py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("beta1"), py::arg("beta2"), py::arg("lr"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("decoupled_weight_decay"), py::arg("maximize"), HFAC_FLAGS, HFAC_PLACES);
  m.def("hfac_sums", &hfac_sums, py::kw_only(), py::arg("grads"), py::arg("numels"), py::arg("grad_dtypes"),
        py::arg("state_dtypes"), py::arg("rows"), py::arg("whole_cols"), py::arg("old_rows"), py::arg("row_sums"),
        py::arg("new_rows"), py::arg("col_sums"), py::arg("col_squares"), py::arg("col_ratios"), py::arg("beta2"),
        py::arg("eps"), py::arg("threads") = 1, py::arg("shapes") = py::none(), py::arg("grad_strides") = py::none());
  m.def("hfac_apply", &hfac_apply, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("whole_rows"),
        py::arg("whole_cols"), py::arg("exp_avg_rows"), py::arg("exp_avg_cols"), py::arg("exp_avg_sq_rows"),
        py::arg("exp_avg_sq_cols"), py::arg("row_sums"), py::arg("new_rows"), py::arg("col_sums"), py::arg("new_cols"),
        py::arg("totals"), py::arg("mean_squares"), py::arg("beta1"), py::arg("lr"), py::arg("clip_threshold"),
        py::arg("weight_decay"), py::arg("maximize"), HFAC_PLACES);
  m.def("smmf_sums_step", &smmf_sums_step, HFAC_OPERANDS, py::arg("rows"), py::arg("cols"), py::arg("exp_avg_rows"),
        py::arg("exp_avg_cols"), py::arg("exp_avg_signs"), py::arg("sign_bytes"), py::arg("sign_slices"),
        py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("new_rows"), py::arg("new_cols"),
        py::arg("new_sq_rows"), py::arg("new_sq_cols"), py::arg("blocks"), py::arg("beta1"), py::arg("beta2"),
        py::arg("lr"), py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled_weight_decay"), py::arg("maximize"),
        HFAC_PLACES);
  m.def("squares", &squares, py::kw_only(), py::arg("grads"), py::arg("numels"), py::arg("grad_dtypes"),
        py::arg("sums"), py::arg("threads") = 1, py::arg("shapes") = py::none(), py::arg("grad_strides") = py::none(),
        "Writes the sum of squares of every tensor that is not empty.");
  m.def("read_floats", &read_floats, py::arg("addresses"), "The float at each address.");
  m.def("advance_floats", &advance_floats, py::arg("addresses"), "Adds one to the float at each address.");
}

}  // namespace bindings
}  // namespace hfac
