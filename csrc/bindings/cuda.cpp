// The CUDA kernels' part of the module: plans, which need no GPU, steps bound to a list, and what CUDA finds here.
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>

#include "../cuda/device.h"
#include "../cuda/plan.h"
#include "items.h"
#ifdef HFAC_CUDA_STEP
#include "../cuda/step.h"
#endif

namespace hfac {
namespace bindings {
namespace {

OpKind op_kind(const std::string& op) {
  std::string known;
  for (const OpKind kind : {OpKind::kHfac, OpKind::kHfacInt8, OpKind::kHfacDense, OpKind::kSmmf, OpKind::kSmmfDense}) {
    if (op == slots_of(kind).name) return kind;
    known += (known.empty() ? "" : ", ") + std::string(slots_of(kind).name);
  }
  refuse("op", "one of " + known + " is needed, not '" + op + "'");
}

// What a plan depends on beside lists.
PlanOptions plan_options(OpKind op, Keywords& k) {
  PlanOptions options{op};
  options.norm = k.flag("norm", py::bool_(false));
  if (const int64_t bytes = k.integer("l2_bytes", 0); bytes > 0) options.l2_bytes = bytes;
  return options;
}

// A plan as a list with one dict per launch.
py::list described(const Plan& plan) {
  py::list out;
  for (const Launch& launch : plan.launches) {
    py::dict d;
    d["kernel"] = name_of(launch.kernel);
    d["access"] = name_of(launch.access);
    d["width"] = launch.kernel == Kernel::hfac_stats ? name_of(launch.width) : "";
    d["group"] = launch.group;
    d["phase"] = name_of(launch.phase);
    d["conditional"] = launch.conditional;
    d["backward"] = launch.backward;
    d["blocks"] = launch.blocks;
    d["small_blocks"] = launch.small_blocks;
    d["first_tile"] = launch.first_tile;
    d["threads"] = launch.threads;
    d["shared"] = launch.shared;
    d["bytes"] = launch.bytes.from_memory();
    d["grad"] = launch.bytes.grad;
    d["grad_from_cache"] = launch.bytes.grad_again;
    d["param_read"] = launch.bytes.param;
    d["param_written"] = launch.bytes.param;
    d["signs"] = launch.bytes.signs;
    d["partial"] = launch.bytes.partial;
    d["states"] = launch.bytes.states;
    out.append(d);
  }
  return out;
}

py::bytes bytes_of(const void* data, size_t size) { return py::bytes(static_cast<const char*>(data), size); }

// What a plan's kernels find in memory and among their arguments, at addresses where nothing is: for bench/walk.py,
// which follows their machine code. Every operand has 2^36 bytes to itself.
py::dict image(std::vector<DeviceItem> items, const Plan& plan, const PlanOptions& options) {
  constexpr uintptr_t kArea = uintptr_t{1} << 40, kOperand = uintptr_t{1} << 36;
  const auto address = [](size_t area, size_t operand) {
    return reinterpret_cast<void*>(kArea * area + kOperand * operand);
  };
  Arguments a{};
  a.items = static_cast<const DeviceItem*>(address(1, 0));
  a.tiles = static_cast<const Tile*>(address(1, 1));
  a.workspace = static_cast<char*>(address(1, 2));
  a.counters = static_cast<int32_t*>(address(1, 3));
  a.nonfinite = options.nonfinite ? static_cast<int32_t*>(address(1, 4)) : nullptr;
  a.scalars.lr.value = a.scalars.weight_decay.value = 0.01;
  a.scalars.beta1.value = 0.9;
  a.scalars.beta2.value = 0.999;
  a.options = {1e-30, 1, options.clip, false, false, options.first_moment};
  for (size_t i = 0; i < items.size(); ++i) {
    DeviceItem& it = items[i];
    size_t operand = 0;
    for (void** data : {&it.param.data, &it.grad.data, &it.first_row, &it.first_col, &it.second_row, &it.second_col}) {
      *data = address(i + 2, operand++);
    }
    it.signs.data = static_cast<uint8_t*>(address(i + 2, operand));
    it.codes = address(i + 2, operand + 1);
    it.param.layout = it.grad.layout = it.storage.low.layout = it.storage.layout = -1;
  }
  py::list arguments;
  for (const Launch& launch : plan.launches) {
    a.tiles = static_cast<const Tile*>(address(1, 1)) + launch.first_tile;
    a.backward = launch.backward;
    a.small_blocks = static_cast<int32_t>(launch.small_blocks);
    arguments.append(bytes_of(&a, sizeof(a)));
  }
  py::dict d;
  d["items"] = bytes_of(items.data(), items.size() * sizeof(DeviceItem));
  d["items_at"] = reinterpret_cast<uintptr_t>(a.items);
  d["tiles"] = bytes_of(plan.tiles.data(), plan.tiles.size() * sizeof(Tile));
  d["tiles_at"] = reinterpret_cast<uintptr_t>(address(1, 1));
  d["count"] = items.size();
  d["operands_at"] = reinterpret_cast<uintptr_t>(address(2, 0));
  d["counters_at"] = reinterpret_cast<uintptr_t>(a.counters);
  d["arguments"] = arguments;
  // Offsets in an item of how it is cut, each five int32: rows, cols, row_tiles, col_tiles, lanes.
  d["tiling"] = offsetof(DeviceItem, tiling);
  d["update"] = offsetof(DeviceItem, update);
  return d;
}

py::dict cuda_plan(const py::kwargs& given) {
  Keywords k(given);
  PlanOptions options = plan_options(op_kind(k.text("op")), k);
  const List rows(k.take("rows"), "rows", -1), cols(k.take("cols"), "cols", rows.size());
  const List params = List::each(k.take("param_dtypes"), "param_dtypes", rows.size());
  const List grads = List::each(k.take("grad_dtypes"), "grad_dtypes", rows.size());
  const std::optional<List> slices = k.optional_list("slices", rows.size());
  options.first_moment = k.flag("first", py::bool_(true));
  options.clip = k.flag("clip", py::bool_(true));
  options.nonfinite = k.flag("nonfinite", py::bool_(false));
  const bool with_image = k.flag("image", py::bool_(false));
  k.done();
  std::vector<DeviceItem> items;
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    DeviceItem item{};
    item.index = static_cast<int32_t>(i);
    item.rows = rows.count(i);
    item.cols = cols.count(i);
    item.param = {nullptr, params.dtype(i), -1};
    item.grad = {nullptr, grads.dtype(i), -1};
    if (slices) {
      item.signs.slice = slices->count(i);
      item.signs.slice_bytes = (item.signs.slice + 7) / 8;
    }
    if (product(item.rows, item.cols, "rows") > 0) items.push_back(item);
  }
  const Plan plan = make_plan(items, assumed_bulk(items, options.op), options);
  py::dict d;
  d["launches"] = described(plan);
  d["workspace_bytes"] = plan.workspace_bytes;
  if (with_image) d["image"] = image(std::move(items), plan, options);
  return d;
}

#ifdef HFAC_CUDA_STEP
// A step scalar: a number, or (address, is it a double, 1 for one entry per parameter else 0).
Scalar scalar(const py::object& value, const char* name) {
  const char* const needed = "a number or (address, double, stride) is needed";
  Scalar s{};
  if (!py::isinstance<py::tuple>(value)) {
    s.value = PyFloat_AsDouble(value.ptr());
    if (s.value != -1 || !PyErr_Occurred()) return s;
    PyErr_Clear();
    refuse(name, needed);
  }
  const List parts(value, name, -1);
  if (parts.size() != 3) refuse(name, needed);
  s.address = parts.address(0, true);
  s.wide = static_cast<int32_t>(parts.count(1));
  s.stride = static_cast<int32_t>(parts.count(2));
  return s;
}

// What launches are told beside addresses, read once for all that are told the same; 0 of numbers that an op does not
// have.
class LaunchNumbers {
 public:
  explicit LaunchNumbers(const py::dict& given) {
    Keywords k(given);
    const py::float_ none(0.0);
    scalars_.lr = scalar(k.take("lr", none), "lr");
    scalars_.weight_decay = scalar(k.take("weight_decay", none), "weight_decay");
    const py::object beta1 = k.take("beta1", none);
    if (!beta1.is_none()) scalars_.beta1 = scalar(beta1, "beta1");
    scalars_.beta2 = scalar(k.take("beta2", none), "beta2");
    scalars_.totals = scalar(k.take("totals", none), "totals");
    scalars_.mean_squares = scalar(k.take("mean_squares", none), "mean_squares");
    scalars_.old_totals = scalar(k.take("old_totals", none), "old_totals");
    const py::object threshold = k.optional("clip_threshold");
    const bool clip = !threshold.is_none();
    const double eps = Value{k.take("eps", none), "eps"}.number();
    const double limit = clip ? Value{threshold, "clip_threshold"}.number() : 1.0;
    const bool maximize = k.flag("maximize", py::bool_(false));
    const bool coupled = !k.flag("decoupled_weight_decay", py::bool_(true));
    options_ = {eps, limit, clip, maximize, coupled, false};
    seed_ = k.optional("seed");
    step_ = k.optional("step");
    k.done();
  }

  void put(Arguments& a, bool first_moment, bool stochastic) const {
    a.scalars = scalars_;
    a.options = options_;
    a.options.first_moment = first_moment;
    if (!stochastic) return;
    a.keys = keys_of(seed_of(seed_));
    if (step_.is_none()) refuse("step", "needed where parameters are rounded stochastically");
    a.step = scalar(step_, "step");
    const double value = a.step.value;
    if (!(value >= 0 && value < 4294967296.0)) refuse("step", "a number in [0, 2^32) is needed");
  }

 private:
  Scalars scalars_{};
  Options options_{};
  py::object seed_, step_;  // of which most ops know nothing
};

// The addresses that launches are told, likewise; null of those that are not given.
class LaunchMemory {
 public:
  explicit LaunchMemory(const py::dict& given) {
    Keywords at(given);
    table_ = at.address<void>("table");
    told_.workspace = at.address<char>("workspace");
    told_.counters = at.address<int32_t>("counters");
    told_.nonfinite = at.address<int32_t>("nonfinite");
    told_.grad_scale = at.address<float>("grad_scale");
    told_.found_inf = at.address<float>("found_inf");
    told_.clip = at.address<float>("clip");
    told_.squares = at.address<double>("squares");
    told_.watched = at.address<double>("watched");
    at.done();
  }

  const void* table() const { return table_; }
  const Arguments& told() const { return told_; }  // nothing else

 private:
  const void* table_;
  Arguments told_{};
};

// What has been read, or is to be read now of a dict.
template <class Read, class Use>
void with(const py::object& given, Use use) {
  if (PyDict_Check(given.ptr())) {
    use(Read(py::reinterpret_borrow<py::dict>(given)));
  } else {
    use(py::cast<const Read&>(given));
  }
}

// A plan with its table and launches, of one op over one list. It is bound to tensors that stay where they are, and
// every step brings gradients; or, for an op on shards, made of lists with gradients for one step.
class CudaStep {
 public:
  CudaStep(OpKind op, const py::kwargs& given) {
    Keywords k(given);
    PlanOptions options = plan_options(op, k);
    const bool on_shards = slots_of(op).on_shards();
    ItemLists lists(slots_of(op), k, false, on_shards);
    k.done();
    std::vector<Item> items = lists.items();
    size_ = lists.size();
    stochastic_ = lists.stochastic();
    first_moment_ = options.first_moment = lists.first_moment();
    kept_ = lists.take();
    step_ = std::make_unique<Step>(std::move(items), size_, options);
    if (!on_shards) return;
    std::vector<TensorRef> grads;
    for (const Item& item : step_->items()) grads.push_back(item.grad);
    step_->prepare(grads, false, false);
  }

  bool prepare(const py::kwargs& given) {
    Keywords k(given);
    const Tensors tensors(k, "grads", "grad_dtypes", "grad_strides", size_);
    const std::optional<List> shapes = k.optional_list("shapes", size_);
    const bool clip = k.flag("clip"), nonfinite = k.flag("nonfinite");
    k.done();
    Kept kept;
    std::vector<TensorRef> grads;
    grads.reserve(step_->items().size());
    for (const Item& item : step_->items()) {
      grads.push_back(tensors.at(static_cast<py::ssize_t>(item.index), item.rows * item.cols, shapes, kept));
    }
    return step_->prepare(grads, clip, nonfinite);
  }

  // Numbers of the op, and addresses: dicts by name, or what has been read of them.
  void launch(const py::object& numbers, const py::object& memory, int device, uintptr_t stream) const {
    Arguments a{};
    const void* table = nullptr;
    with<LaunchMemory>(memory, [&](const LaunchMemory& read) {
      a = read.told();
      table = read.table();
    });
    with<LaunchNumbers>(numbers, [&](const LaunchNumbers& read) { read.put(a, first_moment_, stochastic_); });
    if (step_->table_bytes() && !table) refuse("table", "a null address");
    const py::gil_scoped_release release;
    step_->launch(table, a, device, reinterpret_cast<void*>(stream));
  }

  void write_table(uintptr_t host) const { step_->write_table(reinterpret_cast<void*>(host)); }
  const Step& step() const { return *step_; }

 private:
  Kept kept_;
  std::unique_ptr<Step> step_;
  py::ssize_t size_ = 0;
  bool first_moment_ = true, stochastic_ = false;
};
#endif

#ifndef HFAC_EMULATED
py::dict cuda_info() {
#ifdef HFAC_WITH_CUDA
  const CudaInfo found = hfac::cuda_info();
#else
  CudaInfo found{};
  found.why_not = "hfac._C was built without CUDA";
#endif
  const auto reason = [](const std::string& why) { return why.empty() ? py::object(py::none()) : py::str(why); };
  py::list devices;
  for (const CudaDevice& device : found.devices) {
    py::dict one;
    one["name"] = device.name;
    one["capability"] = py::make_tuple(device.major, device.minor);
    one["usable"] = device.why_not.empty();
    one["why_not"] = reason(device.why_not);
    devices.append(one);
  }
  py::dict d;
  d["compiled"] = !found.architectures.empty();
  d["architectures"] = found.architectures;
  d["devices"] = devices;
  d["driver_version"] = found.driver_version;
  d["runtime_version"] = found.runtime_version;
  d["why_not"] = reason(found.why_not);
  return d;
}
#endif

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_plan", &cuda_plan,
        "The launches that a step on the GPU consists of, with blocks, threads and bytes; needs no GPU.");
#ifdef HFAC_CUDA_STEP
  py::class_<LaunchNumbers>(m, "LaunchNumbers", "What launches are told beside addresses, read once of a dict by name.")
      .def(py::init<const py::dict&>(), py::arg("numbers"));
  py::class_<LaunchMemory>(m, "LaunchMemory", "The addresses that launches are told, likewise.")
      .def(py::init<const py::dict&>(), py::arg("addresses"));
  py::class_<CudaStep> step(m, "CudaStep", "The launches of one op over one list, and the table that they read.");
  step.def("prepare", &CudaStep::prepare,
           "Takes a step's gradients; true where the table in device memory is out of date.")
      .def("launch", &CudaStep::launch, py::arg("numbers"), py::arg("memory"), py::arg("device") = 0,
           py::arg("stream") = 0)
      .def("write_table", &CudaStep::write_table, py::arg("host"))
      .def("plan", [](const CudaStep& s) { return described(s.step().plan()); })
      .def_property_readonly("table_bytes", [](const CudaStep& s) { return s.step().table_bytes(); })
      .def_property_readonly("workspace_bytes", [](const CudaStep& s) { return s.step().workspace_bytes(); })
      .def_property_readonly("counter_bytes", [](const CudaStep& s) { return s.step().counter_bytes(); });
  for (const OpKind op : {OpKind::kHfac, OpKind::kHfacDense, OpKind::kSmmf, OpKind::kSmmfDense, OpKind::kHfacSums,
                          OpKind::kHfacApply, OpKind::kSmmfSums, OpKind::kHfacInt8, OpKind::kHfacInt8Apply}) {
    step.def_static(
        slots_of(op).name, [op](const py::kwargs& given) { return CudaStep(op, given); },
        "The op bound to the addresses of parameters and lists; to those of gradients where it is one on shards.");
  }
#endif
  m.def("slots", &slot_names, "Of every op the names of its lists, in order.");
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
