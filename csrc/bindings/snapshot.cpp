// What a list of tensors is in memory, in one call: a warm step compares it with what an earlier step validated.
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "items.h"

namespace hfac {
namespace bindings {
namespace {

// How to read a tensor; null where this version of torch does not say.
const dlpack::ExchangeApi* api = nullptr;

bool set_exchange_api(const py::object& capsule) {
  const auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (!found) throw py::error_already_set();
  const dlpack::Header* header = &found->header;
  while (header && header->major > dlpack::kMajor) header = header->earlier;
  found = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  api = found && found->header.major == dlpack::kMajor && found->read ? found : nullptr;
  return api != nullptr;
}

// Of every tensor its Python type, device, element type, shape and strides, and where it lies. Never changes.
class Snapshot {
 public:
  // False, with nothing raised, where one of the objects is no tensor that has elements in memory.
  bool read(const py::list& tensors) {
    const py::ssize_t size = PyList_GET_SIZE(tensors.ptr());
    addresses_.reserve(static_cast<size_t>(size));
    kinds_.reserve(static_cast<size_t>(size) * 7);
    for (py::ssize_t i = 0; i < size; ++i) {
      PyObject* const object = PyList_GET_ITEM(tensors.ptr(), i);
      dlpack::Tensor tensor;
      if (api->read(object, &tensor)) {
        PyErr_Clear();
        return false;
      }
      int64_t elements = 1;
      for (int32_t d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d];
      if (!tensor.data && elements > 0) return false;  // zeros without memory
      addresses_.push_back(reinterpret_cast<int64_t>(tensor.data) + static_cast<int64_t>(tensor.byte_offset));
      kinds_.push_back(reinterpret_cast<int64_t>(Py_TYPE(object)));
      kinds_.push_back(static_cast<int64_t>(tensor.device.type) << 32 | tensor.device.index);
      kinds_.push_back(static_cast<int64_t>(tensor.dtype.code) << 32 | tensor.dtype.bits << 16 | tensor.dtype.lanes);
      kinds_.push_back(tensor.ndim);
      kinds_.insert(kinds_.end(), tensor.shape, tensor.shape + tensor.ndim);
      kinds_.insert(kinds_.end(), tensor.strides, tensor.strides + tensor.ndim);
    }
    return true;
  }

  bool alike(const Snapshot& other) const { return kinds_ == other.kinds_; }
  bool same(const Snapshot& other) const { return addresses_ == other.addresses_ && alike(other); }
  const std::vector<int64_t>& addresses() const { return addresses_; }

 private:
  std::vector<int64_t> addresses_, kinds_;
};

py::object snapshot(const py::list& tensors) {
  auto found = std::make_unique<Snapshot>();
  if (!api || !found->read(tensors)) return py::none();
  return py::cast(std::move(found));
}

// Are the values of these dicts, one after the other, these objects?
bool values_are(const py::list& dicts, const py::list& objects) {
  const py::ssize_t count = PyList_GET_SIZE(dicts.ptr()), size = PyList_GET_SIZE(objects.ptr());
  py::ssize_t k = 0;
  bool same = true;
  for (py::ssize_t i = 0; same && i < count; ++i) {
    PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) return false;
    PyObject* value;
    py::ssize_t at = 0;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(dict);
#endif
    while (same && PyDict_Next(dict, &at, nullptr, &value)) {
      same = k < size && PyList_GET_ITEM(objects.ptr(), k) == value;
      ++k;
    }
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
  }
  return same && k == size;
}

bool identical(const py::list& now, const py::list& before) {
  const py::ssize_t size = PyList_GET_SIZE(now.ptr());
  if (size != PyList_GET_SIZE(before.ptr())) return false;
  for (py::ssize_t i = 0; i < size; ++i) {
    if (PyList_GET_ITEM(now.ptr(), i) != PyList_GET_ITEM(before.ptr(), i)) return false;
  }
  return true;
}

// Floats on the host that count steps together.
class Counters {
 public:
  explicit Counters(const py::object& addresses) {
    const List list(addresses, "addresses", -1);
    for (py::ssize_t i = 0; i < list.size(); ++i) at_.push_back(static_cast<float*>(list.address(i, true)));
  }
  // What all of them are; None where they differ.
  py::object common() const {
    for (const float* const one : at_) {
      if (*one != *at_.front()) return py::none();
    }
    if (at_.empty()) return py::none();
    return py::float_(static_cast<double>(*at_.front()));
  }
  void advance() const {
    for (float* const one : at_) *one += 1.0f;
  }

 private:
  std::vector<float*> at_;
};

}  // namespace

void define_snapshots(py::module_& m) {
  m.def("set_exchange_api", &set_exchange_api, py::arg("capsule"),
        "Takes torch.Tensor.__dlpack_c_exchange_api__; whether snapshots can be taken with it.");
  py::class_<Snapshot>(m, "Snapshot", "What a list of tensors was in memory.")
      .def("alike", &Snapshot::alike, "Same types, devices, shapes and strides.")
      .def("same", &Snapshot::same, "Alike, and at the same addresses.")
      .def_property_readonly("addresses", &Snapshot::addresses);
  m.def("snapshot", &snapshot, py::arg("tensors"), "A Snapshot; None where one of them cannot be read as it lies.");
  m.def("values_are", &values_are, py::arg("dicts"), py::arg("objects"),
        "Whether these are the values of the dicts, one after the other.");
  m.def("identical", &identical, py::arg("now"), py::arg("before"), "Whether two lists have the same objects.");
  py::class_<Counters>(m, "Counters", "Floats at addresses on the host, which count together.")
      .def(py::init<const py::object&>(), py::arg("addresses"))
      .def("common", &Counters::common, "What all of them are; None where they differ.")
      .def("advance", &Counters::advance, "Adds one to each.");
}

}  // namespace bindings
}  // namespace hfac
