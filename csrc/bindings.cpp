// The module hfac._C: keyword arguments in, checked structs out. The only file that knows pybind11; no tensor library
// at all.
//
// Addresses arrive as integers. What can be checked without reading them is checked here, and a bad call raises
// ValueError with the argument's name; that an address holds what it is said to hold is the caller's promise
// (hfac/backends/cpu.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/plan.h"
#if defined(HFAC_WITH_CUDA) || defined(HFAC_EMULATED)
#define HFAC_CUDA_STEP
#include "cuda/step.h"
#endif
#ifdef HFAC_EMULATED
#include "cpu/signs.h"
#include "emulation/emulation.h"
#else
#include "cpu/level.h"
#include "cpu/ops.h"
#endif
#ifdef HFAC_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

using hfac::DType;
using hfac::Strided;
using hfac::TensorRef;

[[noreturn]] void refuse(const char* name, const std::string& why) {
  throw std::invalid_argument(std::string(name) + ": " + why);
}

// A list argument; `size` below zero leaves its length free.
class List {
 public:
  List(const py::object& value, const char* name, py::ssize_t size) : name_(name) {
    fast_ = py::reinterpret_steal<py::object>(PySequence_Fast(value.ptr(), "not a sequence"));
    if (!fast_) {
      PyErr_Clear();
      refuse(name, "a list is needed, not " + std::string(py::str(py::type::of(value))));
    }
    size_ = PySequence_Fast_GET_SIZE(fast_.ptr());
    if (size >= 0 && size_ != size) {
      refuse(name, std::to_string(size_) + " entries, but params has " + std::to_string(size));
    }
  }

  py::ssize_t size() const { return size_; }
  py::handle operator[](py::ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

  int64_t integer(py::ssize_t i) const {
    const long long value = PyLong_AsLongLong((*this)[i].ptr());
    if (value == -1 && PyErr_Occurred()) bad(i, "an integer is needed");
    return value;
  }

  int64_t count(py::ssize_t i) const {
    const int64_t value = integer(i);
    if (value < 0) bad(i, "negative: " + std::to_string(value));
    return value;
  }

  void* address(py::ssize_t i, bool needed) const {
    void* value = PyLong_AsVoidPtr((*this)[i].ptr());
    if (!value && PyErr_Occurred()) bad(i, "an address is needed");
    if (!value && needed) bad(i, "a null address for a tensor that is not empty");
    return value;
  }

  double number(py::ssize_t i) const {
    const double value = PyFloat_AsDouble((*this)[i].ptr());
    if (value == -1 && PyErr_Occurred()) bad(i, "a number is needed");
    return value;
  }

  [[noreturn]] void bad(py::ssize_t i, const std::string& why) const {
    PyErr_Clear();
    refuse(name_, "entry " + std::to_string(i) + ": " + why);
  }

 private:
  const char* name_;
  py::object fast_;
  py::ssize_t size_;
};

// One value for all parameters, or a list with one per parameter.
class PerParameter {
 public:
  PerParameter(const py::object& value, const char* name, py::ssize_t size)
      : list_(PyNumber_Check(value.ptr()) && !PySequence_Check(value.ptr()) ? py::make_tuple(value) : value, name, -1) {
    if (list_.size() != 1 && list_.size() != size) {
      refuse(name, std::to_string(list_.size()) + " entries, but params has " + std::to_string(size));
    }
  }
  double number(py::ssize_t i) const { return list_.number(list_.size() == 1 ? 0 : i); }
  DType dtype(py::ssize_t i) const {
    const py::ssize_t k = list_.size() == 1 ? 0 : i;
    const int64_t code = list_.integer(k);
    if (code < 0 || code >= hfac::kDTypes) list_.bad(k, "unknown dtype code " + std::to_string(code));
    return static_cast<DType>(code);
  }

 private:
  List list_;
};

std::vector<int64_t> counts(const py::handle& value, const char* name) {
  const List list(py::reinterpret_borrow<py::object>(value), name, -1);
  std::vector<int64_t> out;
  for (py::ssize_t d = 0; d < list.size(); ++d) out.push_back(list.count(d));
  return out;
}

int64_t product(int64_t a, int64_t b, const char* name) {
  int64_t c;
  if (__builtin_mul_overflow(a, b, &c)) refuse(name, "the number of elements overflows");
  return c;
}

// Tensors by address, with their types and, where not contiguous, strides.
class Tensors {
 public:
  Tensors(const py::object& addresses, const char* name, py::ssize_t size, const py::object& dtypes,
          const char* dtypes_name, const py::object& strides, const char* strides_name)
      : addresses_(addresses, name, size),
        dtypes_(dtypes, dtypes_name, addresses_.size()),
        strides_(strides),
        strides_name_(strides_name) {}

  py::ssize_t size() const { return addresses_.size(); }

  TensorRef at(py::ssize_t i, const List& numels, const py::object& shapes) {
    return {addresses_.address(i, true), dtypes_.dtype(i), strided(i, numels, shapes)};
  }

 private:
  const Strided* strided(py::ssize_t i, const List& numels, const py::object& shapes) {
    if (strides_.is_none()) return nullptr;
    const py::handle mine = List(strides_, strides_name_, size())[i];
    if (mine.is_none()) return nullptr;
    if (shapes.is_none()) refuse("shapes", "needed where " + std::string(strides_name_) + " is given");
    Strided s;
    s.sizes = counts(List(shapes, "shapes", size())[i], "shapes");
    s.strides = counts(mine, strides_name_);
    if (s.sizes.size() != s.strides.size()) {
      refuse(strides_name_, "entry " + std::to_string(i) + ": not as many as dimensions");
    }
    int64_t elements = 1;
    for (const int64_t d : s.sizes) elements = product(elements, d, "shapes");
    if (elements != numels.count(i)) {
      refuse("shapes", "entry " + std::to_string(i) + ": " + std::to_string(elements) + " elements, numels has " +
                           std::to_string(numels.count(i)));
    }
    layouts_.push_back(std::move(s));
    return &layouts_.back();
  }

  List addresses_;
  PerParameter dtypes_;
  py::object strides_;
  const char* strides_name_;
  std::deque<Strided> layouts_;  // addresses of its entries stay valid as it grows
};

// The arguments that every op has: parameters and gradients.
class Operands {
 public:
  Operands(const py::object& params, const py::object& grads, const py::object& numels, const py::object& param_dtypes,
           const py::object& grad_dtypes, const py::object& shapes, const py::object& param_strides,
           const py::object& grad_strides)
      : params_(params, "params", -1, param_dtypes, "param_dtypes", param_strides, "param_strides"),
        grads_(grads, "grads", size(), grad_dtypes, "grad_dtypes", grad_strides, "grad_strides"),
        numels_(numels, "numels", size()),
        shapes_(shapes) {}

  py::ssize_t size() const { return params_.size(); }
  int64_t numel(py::ssize_t i) const { return numels_.count(i); }
  TensorRef param(py::ssize_t i) { return params_.at(i, numels_, shapes_); }
  TensorRef grad(py::ssize_t i) { return grads_.at(i, numels_, shapes_); }

 private:
  Tensors params_, grads_;
  List numels_;
  py::object shapes_;
};

void* optional(const py::object& list, const char* name, py::ssize_t size, py::ssize_t i) {
  return list.is_none() ? nullptr : List(list, name, size).address(i, true);
}

int64_t matrix(const List& rows, const List& cols, py::ssize_t i, int64_t numel) {
  const int64_t elements = product(rows.count(i), cols.count(i), "rows");
  if (elements != numel) {
    refuse("rows", "entry " + std::to_string(i) + ": rows * cols is " + std::to_string(elements) + ", numels has " +
                       std::to_string(numel));
  }
  return elements;
}

// How the sign bits of a parameter of `numel` elements lie: `bytes` of them, in `slices` slices of the first dimension
// (0 where the number does not matter because the bytes say all: whole bytes throughout, or one element per byte).
hfac::Signs signs(void* data, int64_t bytes, int64_t slices, int64_t numel, py::ssize_t i) {
  auto* p = static_cast<uint8_t*>(data);
  if (numel % 8 == 0 && bytes == numel / 8) return {p, numel, bytes};
  if (bytes == numel) return {p, 1, 1};
  if (slices > 0 && numel % slices == 0 && bytes == slices * ((numel / slices + 7) / 8)) {
    return {p, numel / slices, bytes / slices};
  }
  refuse("sign_bytes", "entry " + std::to_string(i) + ": " + std::to_string(bytes) + " bytes in " +
                           std::to_string(slices) + " slices do not hold the signs of " + std::to_string(numel) +
                           " elements");
}

#ifdef HFAC_CUDA_STEP
// A step scalar: a number, or (address, is it a double, 1 for one entry per parameter else 0).
hfac::Scalar scalar(const py::object& value, const char* name) {
  hfac::Scalar s{};
  if (!py::isinstance<py::tuple>(value)) {
    s.value = PyFloat_AsDouble(value.ptr());
    if (s.value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      refuse(name, "a number or (address, double, stride) is needed");
    }
    return s;
  }
  const List parts(value, name, -1);
  if (parts.size() != 3) refuse(name, "a number or (address, double, stride) is needed");
  s.address = parts.address(0, true);
  s.wide = static_cast<int32_t>(parts.count(1));
  s.stride = static_cast<int32_t>(parts.count(2));
  return s;
}
#endif

hfac::OpKind op_kind(const std::string& op) {
  if (op == "hfac_step") return hfac::OpKind::kHfac;
  if (op == "hfac_dense_step") return hfac::OpKind::kHfacDense;
  if (op == "smmf_step") return hfac::OpKind::kSmmf;
  if (op == "smmf_dense_step") return hfac::OpKind::kSmmfDense;
  refuse("op", "hfac_step, hfac_dense_step, smmf_step or smmf_dense_step is needed, not '" + op + "'");
}

// A plan as a list with one dict per launch.
py::list described(const hfac::Plan& plan) {
  py::list out;
  for (const hfac::Launch& launch : plan.launches) {
    py::dict d;
    d["kernel"] = hfac::name_of(launch.kernel);
    d["access"] = hfac::name_of(launch.access);
    d["width"] = launch.kernel == hfac::Kernel::kHfacStats ? hfac::name_of(launch.width) : "";
    d["group"] = launch.group;
    d["backward"] = launch.backward;
    d["blocks"] = launch.tiles;
    d["threads"] = launch.threads;
    d["bytes"] = launch.bytes.from_memory();
    d["grad"] = launch.bytes.grad;
    d["grad_from_cache"] = launch.bytes.grad_again;
    d["param_read"] = launch.bytes.param_read;
    d["param_written"] = launch.bytes.param_written;
    d["signs"] = launch.bytes.signs;
    d["partial"] = launch.bytes.partial;
    d["states"] = launch.bytes.states;
    out.append(d);
  }
  return out;
}

py::dict cuda_plan(const std::string& op, py::object rows, py::object cols, py::object param_dtypes,
                   py::object grad_dtypes, py::object slices, bool first, bool clip, bool nonfinite, int64_t l2_bytes) {
  const List n(rows, "rows", -1), m(cols, "cols", n.size());
  const PerParameter params(param_dtypes, "param_dtypes", n.size()), grads(grad_dtypes, "grad_dtypes", n.size());
  std::vector<hfac::Item> items;
  for (py::ssize_t i = 0; i < n.size(); ++i) {
    hfac::Item item{};
    item.rows = n.count(i);
    item.cols = m.count(i);
    item.param = {nullptr, static_cast<int32_t>(params.dtype(i)), -1};
    item.grad = {nullptr, static_cast<int32_t>(grads.dtype(i)), -1};
    if (!slices.is_none()) {
      item.slice = List(slices, "slices", n.size()).count(i);
      item.slice_bytes = (item.slice + 7) / 8;
    }
    if (product(item.rows, item.cols, "rows") > 0) items.push_back(item);
  }
  hfac::PlanOptions options{op_kind(op), first, clip, nonfinite};
  if (l2_bytes > 0) options.l2_bytes = l2_bytes;
  const hfac::Plan plan = hfac::make_plan(items, hfac::assumed_bulk(items), options);
  py::dict d;
  d["launches"] = described(plan);
  d["workspace_bytes"] = plan.workspace_bytes;
  return d;
}

#ifdef HFAC_CUDA_STEP
// hfac::Step, with what it was told of strides.
class CudaStep {
 public:
  CudaStep(const std::string& op, py::object params, py::object numels, py::object param_dtypes, py::object rows,
           py::object cols, py::object first_rows, py::object first_cols, py::object second_rows,
           py::object second_cols, py::object exp_avg_signs, py::object sign_bytes, py::object sign_slices,
           py::object shapes, py::object param_strides, int64_t l2_bytes)
      : params_(params, "params", -1, param_dtypes, "param_dtypes", param_strides, "param_strides") {
    const py::ssize_t size = params_.size();
    const List count(numels, "numels", size), n(rows, "rows", size), m(cols, "cols", size);
    std::vector<hfac::BoundItem> items;
    for (py::ssize_t i = 0; i < size; ++i) {
      const int64_t numel = count.count(i);
      numels_.push_back(numel);
      if (matrix(n, m, i, numel) == 0) continue;
      hfac::BoundItem item{i,
                           params_.at(i, count, shapes),
                           n.count(i),
                           m.count(i),
                           optional(first_rows, "first_rows", size, i),
                           optional(first_cols, "first_cols", size, i),
                           optional(second_rows, "second_rows", size, i),
                           optional(second_cols, "second_cols", size, i),
                           nullptr,
                           0,
                           0};
      if (!exp_avg_signs.is_none()) {
        const hfac::Signs s = signs(optional(exp_avg_signs, "exp_avg_signs", size, i),
                                    List(sign_bytes, "sign_bytes", size).count(i),
                                    List(sign_slices, "sign_slices", size).count(i), numel, i);
        item.signs = s.data;
        item.slice = s.slice;
        item.slice_bytes = s.slice_bytes;
      }
      items.push_back(item);
    }
    first_ = !first_rows.is_none();
    hfac::PlanOptions options{op_kind(op), first_};
    if (l2_bytes > 0) options.l2_bytes = l2_bytes;
    step_ = std::make_unique<hfac::Step>(std::move(items), size, options);
  }

  bool prepare(py::object grads, py::object grad_dtypes, py::object shapes, py::object grad_strides, bool clip,
               bool nonfinite) {
    py::list numels;
    if (!grad_strides.is_none()) {
      for (const int64_t n : numels_) numels.append(n);
    }
    const auto size = static_cast<py::ssize_t>(numels_.size());
    Tensors tensors(grads, "grads", size, grad_dtypes, "grad_dtypes", grad_strides, "grad_strides");
    const List counts(numels, "numels", -1);
    std::vector<hfac::BoundGrad> bound;
    for (const hfac::BoundItem& item : step_->items()) {
      const TensorRef grad = tensors.at(static_cast<py::ssize_t>(item.index), counts, shapes);
      bound.push_back({grad.data, grad.dtype, grad.strided});
    }
    return step_->prepare(bound, clip, nonfinite);
  }

  void launch(uintptr_t table, uintptr_t workspace, uintptr_t counters, py::object lr, py::object weight_decay,
              py::object beta1, py::object beta2, double eps, std::optional<double> clip_threshold, bool maximize,
              bool coupled, uintptr_t nonfinite, uintptr_t grad_scale, uintptr_t found_inf, int device,
              uintptr_t stream) const {
    hfac::Scalars s{};
    s.lr = scalar(lr, "lr");
    s.weight_decay = scalar(weight_decay, "weight_decay");
    s.beta1 = scalar(beta1.is_none() ? py::float_(0.0) : beta1, "beta1");
    s.beta2 = scalar(beta2, "beta2");
    s.eps = eps;
    s.clip_threshold = clip_threshold.value_or(1.0);
    s.clip = clip_threshold.has_value();
    s.maximize = maximize;
    s.coupled = coupled;
    s.first = first_;
    const hfac::Memory memory{reinterpret_cast<void*>(table), reinterpret_cast<void*>(workspace),
                              reinterpret_cast<void*>(counters)};
    if (step_->table_bytes() && !table) refuse("table", "a null address");
    const py::gil_scoped_release release;
    step_->launch(memory, s, reinterpret_cast<int32_t*>(nonfinite), reinterpret_cast<const float*>(grad_scale),
                  reinterpret_cast<const float*>(found_inf), device, reinterpret_cast<void*>(stream));
  }

  void write_table(uintptr_t host) const { step_->write_table(reinterpret_cast<void*>(host)); }
  size_t table_bytes() const { return step_->table_bytes(); }
  size_t workspace_bytes() const { return step_->workspace_bytes(); }
  size_t counter_bytes() const { return step_->counter_bytes(); }
  py::list plan() const { return described(step_->plan()); }

 private:
  Tensors params_;
  std::vector<int64_t> numels_;
  bool first_ = false;
  std::unique_ptr<hfac::Step> step_;
};
#endif

#ifndef HFAC_EMULATED
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
  std::vector<hfac::HfacItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    if (matrix(m, n, i, operands.numel(i)) == 0) continue;
    items.push_back({i, operands.param(i), operands.grad(i), m.count(i), n.count(i), u.address(i, true),
                     v.address(i, true), r.address(i, true), s.address(i, true), b1.number(i), b2.number(i)});
  }
  const hfac::HfacOptions options{lr,
                                  eps,
                                  clip_threshold.value_or(1.0),
                                  weight_decay,
                                  clip_threshold.has_value(),
                                  maximize,
                                  flags(nonfinite, size),
                                  at_least_one(threads)};
  return unlocked([&] { return hfac::hfac_step(items, options); });
}

std::vector<hfac::DenseItem> dense_items(Operands& operands, const py::object& exp_avgs, const py::object& exp_avg_sqs,
                                         const py::object& beta1, const py::object& beta2) {
  const py::ssize_t size = operands.size();
  const List q(exp_avg_sqs, "exp_avg_sqs", size);
  const PerParameter b1(beta1.is_none() ? py::float_(0.0) : beta1, "beta1", size), b2(beta2, "beta2", size);
  std::vector<hfac::DenseItem> items;
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
  const hfac::HfacOptions options{lr,
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
  std::vector<hfac::SmmfItem> items;
  items.reserve(static_cast<size_t>(size));
  for (py::ssize_t i = 0; i < size; ++i) {
    const int64_t numel = operands.numel(i);
    if (matrix(n, m, i, numel) == 0) continue;
    hfac::SmmfItem item{i,  operands.param(i),    operands.grad(i),     n.count(i),   m.count(i),  nullptr, nullptr,
                        {}, r_v.address(i, true), c_v.address(i, true), b1.number(i), b2.number(i)};
    if (first) {
      item.exp_avg_row = r_m.address(i, true);
      item.exp_avg_col = c_m.address(i, true);
      item.signs = signs(bits.address(i, true), bytes.count(i), sliced ? slices.count(i) : 0, numel, i);
    }
    items.push_back(item);
  }
  const hfac::SmmfOptions options{
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
  const hfac::SmmfOptions options{lr,
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
  d["isa_compiled"] = hfac::levels_compiled();
  d["isa_usable"] = hfac::levels_usable();
  d["isa"] = hfac::level();
  return d;
}

py::dict cuda_info() {
  py::dict d;
#ifdef HFAC_WITH_CUDA
  const hfac::CudaInfo found = hfac::cuda_info();
  py::list devices;
  for (const hfac::CudaDevice& device : found.devices) {
    py::dict one;
    one["name"] = device.name;
    one["capability"] = py::make_tuple(device.major, device.minor);
    devices.append(one);
  }
  d["compiled"] = true;
  d["devices"] = devices;
  d["driver_version"] = found.driver_version;
  d["runtime_version"] = found.runtime_version;
  d["why_not"] = found.why_not.empty() ? py::object(py::none()) : py::object(py::str(found.why_not));
#else
  d["compiled"] = false;
  d["devices"] = py::list();
  d["driver_version"] = 0;
  d["runtime_version"] = 0;
  d["why_not"] = "hfac._C was built without CUDA";
#endif
  return d;
}
#endif  // HFAC_EMULATED

void define_cuda(py::module_& m) {
  m.def("cuda_plan", &cuda_plan, py::kw_only(), py::arg("op"), py::arg("rows"), py::arg("cols"),
        py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("slices") = py::none(), py::arg("first") = true,
        py::arg("clip") = true, py::arg("nonfinite") = false, py::arg("l2_bytes") = 0,
        "The launches that a step on the GPU consists of, with blocks, threads and bytes; needs no GPU.");
#ifdef HFAC_CUDA_STEP
  py::class_<CudaStep>(m, "CudaStep", "One op over one list of parameters, bound to their addresses.")
      .def(py::init<const std::string&, py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object, py::object, py::object, py::object, py::object, py::object, py::object, py::object,
                    int64_t>(),
           py::kw_only(), py::arg("op"), py::arg("params"), py::arg("numels"), py::arg("param_dtypes"), py::arg("rows"),
           py::arg("cols"), py::arg("first_rows"), py::arg("first_cols"), py::arg("second_rows"),
           py::arg("second_cols"), py::arg("exp_avg_signs") = py::none(), py::arg("sign_bytes") = py::none(),
           py::arg("sign_slices") = py::none(), py::arg("shapes") = py::none(), py::arg("param_strides") = py::none(),
           py::arg("l2_bytes") = 0)
      .def("prepare", &CudaStep::prepare, py::kw_only(), py::arg("grads"), py::arg("grad_dtypes"),
           py::arg("shapes") = py::none(), py::arg("grad_strides") = py::none(), py::arg("clip"), py::arg("nonfinite"),
           "Takes this step's gradients; true where the table in device memory is out of date.")
      .def("launch", &CudaStep::launch, py::kw_only(), py::arg("table"), py::arg("workspace"), py::arg("counters"),
           py::arg("lr"), py::arg("weight_decay"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("clip_threshold"), py::arg("maximize"), py::arg("coupled"), py::arg("nonfinite") = 0,
           py::arg("grad_scale") = 0, py::arg("found_inf") = 0, py::arg("device") = 0, py::arg("stream") = 0)
      .def("write_table", &CudaStep::write_table, py::arg("host"))
      .def("plan", &CudaStep::plan)
      .def_property_readonly("table_bytes", &CudaStep::table_bytes)
      .def_property_readonly("workspace_bytes", &CudaStep::workspace_bytes)
      .def_property_readonly("counter_bytes", &CudaStep::counter_bytes);
#endif
}

}  // namespace

#ifdef HFAC_EMULATED
PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels of hfac, compiled for the host. For tests.";
  define_cuda(m);
  m.def("set_block_order", &hfac::emulation::set_block_order, py::arg("order"));
  m.def("set_threading", &hfac::emulation::set_threading, py::arg("threading"));
  m.def("take_launches", &hfac::emulation::take_launches, "Launches since the last call.");
}
#else

#define HFAC_OPERANDS \
  py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("numels"), py::arg("param_dtypes"), py::arg("grad_dtypes")
#define HFAC_PLACES                                                                 \
  py::arg("nonfinite") = 0, py::arg("threads") = 1, py::arg("shapes") = py::none(), \
  py::arg("param_strides") = py::none(), py::arg("grad_strides") = py::none()

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of hfac. Each op returns the bytes of workspace that it held at most.";
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
  define_cuda(m);
  m.def("info", &info, "Version, compiler and instruction sets: compiled, usable on this processor, in use.");
  m.def("cuda_info", &cuda_info, "Whether CUDA was compiled in, the devices, and if none is usable, why.");
  m.def("set_isa", &hfac::set_level, py::arg("name"),
        "Use a lower instruction set than the best; '' is the best. The results are the same to the bit.");
}
#endif
