// The CUDA kernels' part of the module: plans, which need no GPU, steps bound to a list, and what CUDA finds here.
#if defined(HFAC_WITH_CUDA) || defined(HFAC_EMULATED)
#define HFAC_CUDA_STEP
#endif

#include <memory>
#include <optional>

#include "../cuda/architectures.h"
#include "../cuda/plan.h"
#include "arguments.h"
#include "modules.h"
#ifdef HFAC_CUDA_STEP
#include "../cuda/step.h"
#endif
#ifdef HFAC_WITH_CUDA
#include "../cuda/device.h"
#endif

namespace hfac {
namespace bindings {
namespace {

#ifdef HFAC_CUDA_STEP
// A step scalar: a number, or (address, is it a double, 1 for one entry per parameter else 0).
Scalar scalar(const py::object& value, const char* name) {
  Scalar s{};
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

// How parameters are stored: lower pieces by address, type (a Low) and strides, and places as hfac.rounding.Place has
// them. None for a list that there is not.
class Stores {
 public:
  Stores(const py::object& lows, const py::object& low_dtypes, const py::object& low_strides, const py::object& places,
         const py::object& shapes, py::ssize_t size)
      : shapes_(shapes), size_(size) {
    if (!lows.is_none()) {
      lows_.emplace(lows, "master_lows", size, py::int_(0), "", low_strides, "master_low_strides");
      kinds_.emplace(low_dtypes, "master_low_dtypes", size);
    }
    if (!places.is_none()) places_.emplace(places, "places", size);
  }

  bool drawn() const { return places_.has_value(); }

  BoundStore at(py::ssize_t i, const List& numels, DType param) {
    BoundStore s;
    if (lows_) {
      const double kind = kinds_->number(i);
      if (kind != static_cast<int>(Low::kInt16) && kind != static_cast<int>(Low::kInt8)) {
        refuse("master_low_dtypes", "entry " + std::to_string(i) + ": unknown code");
      }
      if (param != DType::kBFloat16) refuse("master_lows", "entry " + std::to_string(i) + ": of no bfloat16 parameter");
      const TensorRef low = lows_->at(i, numels, shapes_);
      s.low = low.data;
      s.kind = static_cast<Low>(static_cast<int>(kind));
      s.low_strided = low.strided;
    }
    if (places_) place(i, numels.count(i), param, s);
    return s;
  }

 private:
  void place(py::ssize_t i, int64_t numel, DType param, BoundStore& s) {
    if (param != DType::kBFloat16 && param != DType::kFloat16) {
      places_->bad(i, "only bfloat16 and float16 are rounded stochastically");
    }
    const List parts(py::reinterpret_borrow<py::object>((*places_)[i]), "places", -1);
    if (parts.size() != 3) places_->bad(i, "(position, first, strides) is needed");
    const int64_t position = parts.count(0);
    if (position >> 32) places_->bad(i, "a position of more than 32 bits");
    s.drawn = true;
    s.position = static_cast<uint32_t>(position);
    s.first = parts.count(1);
    int64_t last = numel - 1;
    if (!parts[2].is_none()) {
      if (shapes_.is_none()) refuse("shapes", "needed where a place has strides");
      Strided way;
      way.sizes = counts(List(shapes_, "shapes", size_)[i], "shapes");
      way.strides = counts(parts[2], "places");
      if (way.sizes.size() != way.strides.size()) places_->bad(i, "not as many strides as dimensions");
      int64_t elements = 1;
      last = 0;
      for (size_t d = 0; d < way.sizes.size(); ++d) {
        elements = product(elements, way.sizes[d], "shapes");
        const int64_t along = way.sizes[d] > 1 ? product(way.sizes[d] - 1, way.strides[d], "places") : 0;
        if (along > INT64_MAX - last) places_->bad(i, "an index overflows");
        last += along;
      }
      if (elements != numel) refuse("shapes", "entry " + std::to_string(i) + ": not the elements that numels has");
      ways_.push_back(std::move(way));
      s.place = &ways_.back();
    }
    if (last > INT64_MAX - s.first) places_->bad(i, "an index overflows");
  }

  std::optional<Tensors> lows_;
  std::optional<PerParameter> kinds_;
  std::optional<List> places_;
  py::object shapes_;
  py::ssize_t size_;
  std::deque<Strided> ways_;  // addresses of its entries stay valid as it grows
};

// Parameters and gradients of an op on parts, and how the parameters are stored.
class PartOperands {
 public:
  PartOperands(const py::object& params, const py::object& grads, const py::object& numels,
               const py::object& param_dtypes, const py::object& grad_dtypes, const py::object& shapes,
               const py::object& param_strides, const py::object& grad_strides, const py::object& lows,
               const py::object& low_dtypes, const py::object& low_strides, const py::object& places)
      : params_(params, "params", -1, param_dtypes, "param_dtypes", param_strides, "param_strides"),
        grads_(grads, "grads", size(), grad_dtypes, "grad_dtypes", grad_strides, "grad_strides"),
        numels_(numels, "numels", size()),
        shapes_(shapes),
        stores_(lows, low_dtypes, low_strides, places, shapes, size()) {}

  py::ssize_t size() const { return params_.size(); }
  int64_t numel(py::ssize_t i) const { return numels_.count(i); }
  bool drawn() const { return stores_.drawn(); }
  TensorRef grad(py::ssize_t i, bool empty = false) { return grads_.at(i, numels_, shapes_, empty); }
  BoundItem item(py::ssize_t i, bool empty = false) {
    BoundItem item{};
    item.index = i;
    item.param = params_.at(i, numels_, shapes_, empty);
    if (!empty) item.store = stores_.at(i, numels_, item.param.dtype);
    return item;
  }

 private:
  Tensors params_, grads_;
  List numels_;
  py::object shapes_;
  Stores stores_;
};
#endif

OpKind op_kind(const std::string& op) {
  if (op == "hfac_step") return OpKind::kHfac;
  if (op == "hfac_dense_step") return OpKind::kHfacDense;
  if (op == "smmf_step") return OpKind::kSmmf;
  if (op == "smmf_dense_step") return OpKind::kSmmfDense;
  refuse("op", "hfac_step, hfac_dense_step, smmf_step or smmf_dense_step is needed, not '" + op + "'");
}

// A plan as a list with one dict per launch.
py::list described(const Plan& plan) {
  py::list out;
  for (const Launch& launch : plan.launches) {
    py::dict d;
    d["kernel"] = name_of(launch.kernel);
    d["access"] = name_of(launch.access);
    d["width"] = launch.kernel == Kernel::kHfacStats ? name_of(launch.width) : "";
    d["group"] = launch.group;
    d["phase"] = name_of(launch.phase);
    d["conditional"] = launch.conditional;
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
                   py::object grad_dtypes, py::object slices, bool first, bool clip, bool nonfinite, int64_t l2_bytes,
                   bool norm) {
  const List n(rows, "rows", -1), m(cols, "cols", n.size());
  const PerParameter params(param_dtypes, "param_dtypes", n.size()), grads(grad_dtypes, "grad_dtypes", n.size());
  std::vector<Item> items;
  for (py::ssize_t i = 0; i < n.size(); ++i) {
    Item item{};
    item.index = static_cast<int32_t>(i);
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
  PlanOptions options{op_kind(op), first, clip, nonfinite, norm};
  if (l2_bytes > 0) options.l2_bytes = l2_bytes;
  const Plan plan = make_plan(items, assumed_bulk(items), options);
  py::dict d;
  d["launches"] = described(plan);
  d["workspace_bytes"] = plan.workspace_bytes;
  return d;
}

#ifdef HFAC_CUDA_STEP
// A plan with its table and launches.
class CudaPlan {
 public:
  void launch(uintptr_t table, uintptr_t workspace, uintptr_t counters, py::object lr, py::object weight_decay,
              py::object beta1, py::object beta2, double eps, std::optional<double> clip_threshold, bool maximize,
              bool coupled, uintptr_t nonfinite, uintptr_t grad_scale, uintptr_t found_inf, py::object totals,
              py::object mean_squares, py::object seed, py::object step, uintptr_t clip, uintptr_t squares,
              uintptr_t watched, int device, uintptr_t stream) const {
    Scalars s{};
    s.lr = scalar(lr, "lr");
    s.weight_decay = scalar(weight_decay, "weight_decay");
    s.beta1 = scalar(beta1.is_none() ? py::float_(0.0) : beta1, "beta1");
    s.beta2 = scalar(beta2, "beta2");
    s.totals = scalar(totals, "totals");
    s.mean_squares = scalar(mean_squares, "mean_squares");
    s.eps = eps;
    s.clip_threshold = clip_threshold.value_or(1.0);
    s.clip = clip_threshold.has_value();
    s.maximize = maximize;
    s.coupled = coupled;
    s.first = first_;
    if (drawn_) {
      const unsigned long long whole = PyLong_AsUnsignedLongLong(seed.ptr());
      if (PyErr_Occurred()) {
        PyErr_Clear();
        refuse("seed", "a whole number from 0 to 2^64 - 1 is needed where there are places");
      }
      s.keys = keys_of(whole);
      if (step.is_none()) refuse("step", "needed where there are places");
      s.step = scalar(step, "step");
      if (!(s.step.value >= 0 && s.step.value < 4294967296.0)) refuse("step", "a number from 0 to 2^32 is needed");
    }
    const Memory memory{reinterpret_cast<void*>(table), reinterpret_cast<void*>(workspace),
                        reinterpret_cast<void*>(counters)};
    if (step_->table_bytes() && !table) refuse("table", "a null address");
    Given given;
    given.nonfinite = reinterpret_cast<int32_t*>(nonfinite);
    given.grad_scale = reinterpret_cast<const float*>(grad_scale);
    given.found_inf = reinterpret_cast<const float*>(found_inf);
    given.clip = reinterpret_cast<const float*>(clip);
    given.squares = reinterpret_cast<double*>(squares);
    given.watched = reinterpret_cast<double*>(watched);
    const py::gil_scoped_release release;
    step_->launch(memory, s, given, device, reinterpret_cast<void*>(stream));
  }

  void write_table(uintptr_t host) const { step_->write_table(reinterpret_cast<void*>(host)); }
  size_t table_bytes() const { return step_->table_bytes(); }
  size_t workspace_bytes() const { return step_->workspace_bytes(); }
  size_t counter_bytes() const { return step_->counter_bytes(); }
  py::list plan() const { return described(step_->plan()); }

 protected:
  CudaPlan() = default;

  std::unique_ptr<Step> step_;
  bool first_ = false;  // there is a first moment
  bool drawn_ = false;  // a launch needs `seed` and `step`
};

// Steps of one op on tensors that stay where they are, with what it was told of their strides.
class CudaStep : public CudaPlan {
 public:
  CudaStep(const std::string& op, py::object params, py::object numels, py::object param_dtypes, py::object rows,
           py::object cols, py::object first_rows, py::object first_cols, py::object second_rows,
           py::object second_cols, py::object exp_avg_signs, py::object sign_bytes, py::object sign_slices,
           py::object shapes, py::object param_strides, py::object master_lows, py::object master_low_dtypes,
           py::object master_low_strides, py::object places, int64_t l2_bytes, bool norm)
      : params_(params, "params", -1, param_dtypes, "param_dtypes", param_strides, "param_strides"),
        stores_(master_lows, master_low_dtypes, master_low_strides, places, shapes, params_.size()) {
    const py::ssize_t size = params_.size();
    drawn_ = stores_.drawn();
    const List count(numels, "numels", size), n(rows, "rows", size), m(cols, "cols", size);
    std::vector<BoundItem> items;
    for (py::ssize_t i = 0; i < size; ++i) {
      const int64_t numel = count.count(i);
      numels_.push_back(numel);
      if (matrix(n, m, i, numel) == 0) continue;
      BoundItem item{i,
                     params_.at(i, count, shapes),
                     n.count(i),
                     m.count(i),
                     optional(first_rows, "first_rows", size, i),
                     optional(first_cols, "first_cols", size, i),
                     optional(second_rows, "second_rows", size, i),
                     optional(second_cols, "second_cols", size, i),
                     nullptr,
                     0,
                     0,
                     0};
      if (!exp_avg_signs.is_none()) {
        const Signs s =
            signs(optional(exp_avg_signs, "exp_avg_signs", size, i), List(sign_bytes, "sign_bytes", size).count(i),
                  List(sign_slices, "sign_slices", size).count(i), numel, i);
        item.signs = s.data;
        item.slice = s.slice;
        item.slice_bytes = s.slice_bytes;
        item.sign_bytes = numel / s.slice * s.slice_bytes;
      }
      item.store = stores_.at(i, count, item.param.dtype);
      items.push_back(item);
    }
    first_ = !first_rows.is_none();
    PlanOptions options{op_kind(op), first_};
    options.norm = norm;
    if (l2_bytes > 0) options.l2_bytes = l2_bytes;
    step_ = std::make_unique<Step>(std::move(items), size, options);
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
    std::vector<BoundGrad> bound;
    for (const BoundItem& item : step_->items()) {
      const TensorRef grad = tensors.at(static_cast<py::ssize_t>(item.index), counts, shapes);
      bound.push_back({grad.data, grad.dtype, grad.strided});
    }
    return step_->prepare(bound, clip, nonfinite);
  }

 private:
  Tensors params_;
  Stores stores_;
  std::vector<int64_t> numels_;
};

// An op on parts, for one step: its lists are new ones each time.
class CudaParts : public CudaPlan {
 public:
  static CudaParts hfac_sums(py::object grads, py::object numels, py::object grad_dtypes, py::object state_dtypes,
                             py::object rows, py::object whole_cols, py::object old_rows, py::object row_sums,
                             py::object new_rows, py::object col_sums, py::object col_squares, py::object col_ratios,
                             py::object shapes, py::object grad_strides) {
    const List counts(numels, "numels", -1);
    const py::ssize_t size = counts.size();
    Tensors tensors(grads, "grads", size, grad_dtypes, "grad_dtypes", grad_strides, "grad_strides");
    const PerParameter dtypes(state_dtypes, "state_dtypes", size);
    const List m(rows, "rows", size), whole(whole_cols, "whole_cols", size);
    const List old(old_rows, "old_rows", size), sums(row_sums, "row_sums", size), r(new_rows, "new_rows", size);
    if (col_sums.is_none() != col_squares.is_none()) refuse("col_squares", "needed exactly where col_sums is given");
    if (col_sums.is_none() != col_ratios.is_none()) refuse("col_ratios", "needed exactly where col_sums is given");
    CudaParts parts;
    for (py::ssize_t i = 0; i < size; ++i) {
      const int64_t numel = counts.count(i), height = m.count(i);
      if (numel == 0) continue;
      if (height == 0 || numel % height != 0) {
        m.bad(i, "no divisor of the part's " + std::to_string(numel) + " elements: " + std::to_string(height));
      }
      const DType state = dtypes.dtype(i);
      if (state != DType::kFloat32 && state != DType::kFloat64) refuse("state_dtypes", "float32 or float64 is needed");
      BoundItem item{};
      item.index = i;
      item.param.dtype = state;  // there is no parameter, but its type says in which type sums are made
      item.rows = height;
      item.cols = numel / height;
      item.second_row = old.address(i, true);
      item.part.cols = whole.count(i);
      item.part.row[0] = sums.address(i, true);
      item.part.row[1] = r.address(i, true);
      item.part.col[0] = optional(col_sums, "col_sums", size, i);
      item.part.col[1] = optional(col_squares, "col_squares", size, i);
      item.part.col[2] = optional(col_ratios, "col_ratios", size, i);
      parts.add(item, tensors.at(i, counts, shapes));
    }
    parts.prepare(OpKind::kHfacSums, size);
    return parts;
  }

  static CudaParts hfac_apply(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                              py::object grad_dtypes, py::object rows, py::object cols, py::object whole_rows,
                              py::object whole_cols, py::object exp_avg_rows, py::object exp_avg_cols,
                              py::object exp_avg_sq_rows, py::object exp_avg_sq_cols, py::object row_sums,
                              py::object new_rows, py::object col_sums, py::object new_cols, py::object shapes,
                              py::object param_strides, py::object grad_strides, py::object master_lows,
                              py::object master_low_dtypes, py::object master_low_strides, py::object places) {
    PartOperands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides,
                          master_lows, master_low_dtypes, master_low_strides, places);
    const py::ssize_t size = operands.size();
    const List m(rows, "rows", size), n(cols, "cols", size);
    const List whole_m(whole_rows, "whole_rows", size), whole_n(whole_cols, "whole_cols", size);
    const List u(exp_avg_rows, "exp_avg_rows", size), v(exp_avg_cols, "exp_avg_cols", size);
    const List r(exp_avg_sq_rows, "exp_avg_sq_rows", size), s(exp_avg_sq_cols, "exp_avg_sq_cols", size);
    const List row_sum(row_sums, "row_sums", size), new_row(new_rows, "new_rows", size);
    const List col_sum(col_sums, "col_sums", size), new_col(new_cols, "new_cols", size);
    CudaParts parts;
    parts.drawn_ = operands.drawn();
    for (py::ssize_t i = 0; i < size; ++i) {
      const bool empty = matrix(m, n, i, operands.numel(i)) == 0;
      const bool tall = m.count(i) > 0, broad = n.count(i) > 0;
      if (!tall && !broad) continue;
      BoundItem item = operands.item(i, empty);
      item.rows = m.count(i);
      item.cols = n.count(i);
      item.first_row = u.address(i, tall);
      item.first_col = v.address(i, broad);
      item.second_row = r.address(i, tall);
      item.second_col = s.address(i, broad);
      item.part.rows = whole_m.count(i);
      item.part.cols = whole_n.count(i);
      item.part.row[0] = row_sum.address(i, tall);
      item.part.row[1] = new_row.address(i, tall);
      item.part.col[0] = col_sum.address(i, broad);
      item.part.col[1] = new_col.address(i, broad);
      parts.add(item, operands.grad(i, empty));
    }
    parts.prepare(OpKind::kHfacApply, size);
    return parts;
  }

  static CudaParts smmf_sums_step(py::object params, py::object grads, py::object numels, py::object param_dtypes,
                                  py::object grad_dtypes, py::object rows, py::object cols, py::object exp_avg_rows,
                                  py::object exp_avg_cols, py::object exp_avg_signs, py::object sign_bytes,
                                  py::object sign_slices, py::object exp_avg_sq_rows, py::object exp_avg_sq_cols,
                                  py::object new_rows, py::object new_cols, py::object new_sq_rows,
                                  py::object new_sq_cols, py::object blocks, py::object shapes,
                                  py::object param_strides, py::object grad_strides, py::object master_lows,
                                  py::object master_low_dtypes, py::object master_low_strides, py::object places) {
    PartOperands operands(params, grads, numels, param_dtypes, grad_dtypes, shapes, param_strides, grad_strides,
                          master_lows, master_low_dtypes, master_low_strides, places);
    const py::ssize_t size = operands.size();
    const List n(rows, "rows", size), m(cols, "cols", size), lists(blocks, "blocks", size);
    CudaParts parts;
    parts.first_ = !exp_avg_rows.is_none();
    parts.drawn_ = operands.drawn();
    if (parts.first_) {
      for (const py::object& list : {exp_avg_cols, exp_avg_signs, sign_bytes, new_rows, new_cols}) {
        if (list.is_none()) refuse("exp_avg_rows", "given without the other lists of the first moment");
      }
    }
    for (py::ssize_t i = 0; i < size; ++i) {
      const int64_t numel = operands.numel(i);
      if (numel == 0) continue;
      BoundItem item = operands.item(i);
      item.second_row = optional(exp_avg_sq_rows, "exp_avg_sq_rows", size, i);
      item.second_col = optional(exp_avg_sq_cols, "exp_avg_sq_cols", size, i);
      item.part.rows = n.count(i);
      item.part.cols = m.count(i);
      item.part.row[1] = optional(new_sq_rows, "new_sq_rows", size, i);
      item.part.col[1] = optional(new_sq_cols, "new_sq_cols", size, i);
      if (parts.first_) {
        item.first_row = optional(exp_avg_rows, "exp_avg_rows", size, i);
        item.first_col = optional(exp_avg_cols, "exp_avg_cols", size, i);
        item.part.row[0] = optional(new_rows, "new_rows", size, i);
        item.part.col[0] = optional(new_cols, "new_cols", size, i);
        const Signs s =
            signs(optional(exp_avg_signs, "exp_avg_signs", size, i), List(sign_bytes, "sign_bytes", size).count(i),
                  sign_slices.is_none() ? 0 : List(sign_slices, "sign_slices", size).count(i), numel, i);
        item.signs = s.data;
        item.slice = s.slice;
        item.slice_bytes = s.slice_bytes;
        item.sign_bytes = numel / s.slice * s.slice_bytes;
      }
      const TensorRef grad = operands.grad(i);
      const std::vector<SmmfBlock> found = bindings::blocks(lists[i], numel, item.part.rows, item.part.cols);
      item.part.blocks = static_cast<int64_t>(found.size());
      for (const SmmfBlock& block : found) {
        const bool many = block.rows > 1;  // or the distance of its rows says nothing
        item.rows = block.rows;
        item.cols = block.cols;
        item.part.first = block.first;
        item.part.stride = many ? block.stride : block.cols;
        item.part.row_at = block.row;
        item.part.row_step = many ? block.row_step : 1;
        item.part.col_at = block.col;
        parts.add(item, grad);
        item.part.blocks = 0;
      }
    }
    parts.prepare(OpKind::kSmmfSums, size);
    return parts;
  }

 private:
  void add(const BoundItem& item, const TensorRef& grad) {
    items_.push_back(item);
    grads_.push_back({grad.data, grad.dtype, grad.strided});
  }

  // While the strides that the entries point at are there; what is read of them is kept.
  void prepare(OpKind op, py::ssize_t size) {
    step_ = std::make_unique<Step>(std::move(items_), size, PlanOptions{op, first_});
    step_->prepare(grads_, false, false);
    grads_.clear();
  }

  std::vector<BoundItem> items_;
  std::vector<BoundGrad> grads_;
};
#endif

#ifndef HFAC_EMULATED
py::dict cuda_info() {
  py::dict d;
#ifdef HFAC_WITH_CUDA
  const CudaInfo found = hfac::cuda_info();
  py::list devices;
  for (const CudaDevice& device : found.devices) {
    py::dict one;
    one["name"] = device.name;
    one["capability"] = py::make_tuple(device.major, device.minor);
    one["usable"] = device.why_not.empty();
    one["why_not"] = device.why_not.empty() ? py::object(py::none()) : py::object(py::str(device.why_not));
    devices.append(one);
  }
  d["compiled"] = true;
  d["architectures"] = found.architectures;
  d["devices"] = devices;
  d["driver_version"] = found.driver_version;
  d["runtime_version"] = found.runtime_version;
  d["why_not"] = found.why_not.empty() ? py::object(py::none()) : py::object(py::str(found.why_not));
#else
  d["compiled"] = false;
  d["architectures"] = py::list();
  d["devices"] = py::list();
  d["driver_version"] = 0;
  d["runtime_version"] = 0;
  d["why_not"] = "hfac._C was built without CUDA";
#endif
  return d;
}
#endif

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_plan", &cuda_plan, py::kw_only(), py::arg("op"), py::arg("rows"), py::arg("cols"),
        py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("slices") = py::none(), py::arg("first") = true,
        py::arg("clip") = true, py::arg("nonfinite") = false, py::arg("l2_bytes") = 0, py::arg("norm") = false,
        "The launches that a step on the GPU consists of, with blocks, threads and bytes; needs no GPU.");
#ifdef HFAC_CUDA_STEP
  py::class_<CudaPlan>(m, "CudaPlan", "The launches of one op over one list, and the table that they read.")
      .def("launch", &CudaPlan::launch, py::kw_only(), py::arg("table"), py::arg("workspace"), py::arg("counters"),
           py::arg("lr"), py::arg("weight_decay"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("clip_threshold"), py::arg("maximize"), py::arg("coupled"), py::arg("nonfinite") = 0,
           py::arg("grad_scale") = 0, py::arg("found_inf") = 0, py::arg("totals") = 0.0, py::arg("mean_squares") = 0.0,
           py::arg("seed") = py::none(), py::arg("step") = py::none(), py::arg("clip") = 0, py::arg("squares") = 0,
           py::arg("watched") = 0, py::arg("device") = 0, py::arg("stream") = 0)
      .def("write_table", &CudaPlan::write_table, py::arg("host"))
      .def("plan", &CudaPlan::plan)
      .def_property_readonly("table_bytes", &CudaPlan::table_bytes)
      .def_property_readonly("workspace_bytes", &CudaPlan::workspace_bytes)
      .def_property_readonly("counter_bytes", &CudaPlan::counter_bytes);
  py::class_<CudaStep, CudaPlan>(m, "CudaStep", "One op over one list of parameters, bound to their addresses.")
      .def(py::init<const std::string&, py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object, py::object, py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object, py::object, py::object, py::object, int64_t, bool>(),
           py::kw_only(), py::arg("op"), py::arg("params"), py::arg("numels"), py::arg("param_dtypes"), py::arg("rows"),
           py::arg("cols"), py::arg("first_rows"), py::arg("first_cols"), py::arg("second_rows"),
           py::arg("second_cols"), py::arg("exp_avg_signs") = py::none(), py::arg("sign_bytes") = py::none(),
           py::arg("sign_slices") = py::none(), py::arg("shapes") = py::none(), py::arg("param_strides") = py::none(),
           py::arg("master_lows") = py::none(), py::arg("master_low_dtypes") = py::none(),
           py::arg("master_low_strides") = py::none(), py::arg("places") = py::none(), py::arg("l2_bytes") = 0,
           py::arg("norm") = false)
      .def("prepare", &CudaStep::prepare, py::kw_only(), py::arg("grads"), py::arg("grad_dtypes"),
           py::arg("shapes") = py::none(), py::arg("grad_strides") = py::none(), py::arg("clip"), py::arg("nonfinite"),
           "Takes this step's gradients; true where the table in device memory is out of date.");
  py::class_<CudaParts, CudaPlan>(m, "CudaParts", "An op on parts of parameters, for one step.")
      .def_static("hfac_sums", &CudaParts::hfac_sums, py::kw_only(), py::arg("grads"), py::arg("numels"),
                  py::arg("grad_dtypes"), py::arg("state_dtypes"), py::arg("rows"), py::arg("whole_cols"),
                  py::arg("old_rows"), py::arg("row_sums"), py::arg("new_rows"), py::arg("col_sums"),
                  py::arg("col_squares"), py::arg("col_ratios"), py::arg("shapes") = py::none(),
                  py::arg("grad_strides") = py::none())
      .def_static("hfac_apply", &CudaParts::hfac_apply, py::kw_only(), py::arg("params"), py::arg("grads"),
                  py::arg("numels"), py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("rows"), py::arg("cols"),
                  py::arg("whole_rows"), py::arg("whole_cols"), py::arg("exp_avg_rows"), py::arg("exp_avg_cols"),
                  py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("row_sums"), py::arg("new_rows"),
                  py::arg("col_sums"), py::arg("new_cols"), py::arg("shapes") = py::none(),
                  py::arg("param_strides") = py::none(), py::arg("grad_strides") = py::none(),
                  py::arg("master_lows") = py::none(), py::arg("master_low_dtypes") = py::none(),
                  py::arg("master_low_strides") = py::none(), py::arg("places") = py::none())
      .def_static("smmf_sums_step", &CudaParts::smmf_sums_step, py::kw_only(), py::arg("params"), py::arg("grads"),
                  py::arg("numels"), py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("rows"), py::arg("cols"),
                  py::arg("exp_avg_rows"), py::arg("exp_avg_cols"), py::arg("exp_avg_signs"), py::arg("sign_bytes"),
                  py::arg("sign_slices"), py::arg("exp_avg_sq_rows"), py::arg("exp_avg_sq_cols"), py::arg("new_rows"),
                  py::arg("new_cols"), py::arg("new_sq_rows"), py::arg("new_sq_cols"), py::arg("blocks"),
                  py::arg("shapes") = py::none(), py::arg("param_strides") = py::none(),
                  py::arg("grad_strides") = py::none(), py::arg("master_lows") = py::none(),
                  py::arg("master_low_dtypes") = py::none(), py::arg("master_low_strides") = py::none(),
                  py::arg("places") = py::none());
#endif
#ifndef HFAC_EMULATED
  m.def(
      "cuda_info", &cuda_info,
      "Whether CUDA was compiled in, for which architectures, and the devices by index, each with whether it is usable "
      "and if not, why; why_not: why there is no device.");
  m.def("cuda_no_code_for", &no_code_for, py::kw_only(), py::arg("architectures"), py::arg("major"), py::arg("minor"),
        py::arg("driver_version"), py::arg("runtime_version"),
        "Why kernels compiled for these architectures do not run on a GPU of this compute capability; '' if they do.");
#endif
}

}  // namespace bindings
}  // namespace hfac
