// What a list of tensors is in memory, in one call: a warm step compares it with what an earlier step validated.
#include <algorithm>
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

// How the tensors of a list are now, beside what a snapshot says of those of an earlier one.
enum Likeness { kOther, kAlike, kSame };

// Of every tensor its Python type, device, element type, shape and strides, and where it lies. Never changes.
class Snapshot {
 public:
  // False, with nothing raised, where one of the objects is no tensor that has elements in memory.
  bool read(const py::list& tensors) {
    const py::ssize_t size = PyList_GET_SIZE(tensors.ptr());
    seen_.reserve(static_cast<size_t>(size));
    sides_.reserve(static_cast<size_t>(size) * 4);
    for (py::ssize_t i = 0; i < size; ++i) {
      dlpack::Tensor tensor;
      Seen seen;
      if (!look(PyList_GET_ITEM(tensors.ptr(), i), tensor, seen)) return false;
      seen_.push_back(seen);
      sides_.insert(sides_.end(), tensor.shape, tensor.shape + tensor.ndim);
      sides_.insert(sides_.end(), tensor.strides, tensor.strides + tensor.ndim);
    }
    return true;
  }

  // kSame: everything is as it was; kAlike: all but addresses. Nothing is kept of the list.
  int compare(const py::list& tensors) const {
    if (PyList_GET_SIZE(tensors.ptr()) != static_cast<py::ssize_t>(seen_.size())) return kOther;
    const int64_t* sides = sides_.data();
    int found = kSame;
    for (size_t i = 0; i < seen_.size(); ++i) {
      dlpack::Tensor tensor;
      Seen now;
      if (!look(PyList_GET_ITEM(tensors.ptr(), static_cast<py::ssize_t>(i)), tensor, now)) return kOther;
      const Seen& then = seen_[i];
      if (now.type != then.type || now.device != then.device || now.dtype != then.dtype || now.ndim != then.ndim) {
        return kOther;
      }
      const size_t ndim = static_cast<size_t>(now.ndim);
      if (!std::equal(sides, sides + ndim, tensor.shape)) return kOther;
      sides += ndim;
      if (!std::equal(sides, sides + ndim, tensor.strides)) return kOther;
      sides += ndim;
      if (now.address != then.address) found = kAlike;
    }
    return found;
  }

  std::vector<int64_t> addresses() const {
    std::vector<int64_t> found;
    found.reserve(seen_.size());
    for (const Seen& one : seen_) found.push_back(one.address);
    return found;
  }

 private:
  struct Seen {
    PyTypeObject* type;
    int64_t address, device, dtype;
    int32_t ndim;
  };

  static bool look(PyObject* object, dlpack::Tensor& tensor, Seen& seen) {
    if (api->read(object, &tensor)) {
      PyErr_Clear();
      return false;
    }
    if (!tensor.data) {
      int64_t elements = 1;
      for (int32_t d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d];
      if (elements > 0) return false;  // zeros without memory
    }
    seen.type = Py_TYPE(object);
    seen.address = reinterpret_cast<int64_t>(tensor.data) + static_cast<int64_t>(tensor.byte_offset);
    seen.device = static_cast<int64_t>(tensor.device.type) << 32 | tensor.device.index;
    seen.dtype = static_cast<int64_t>(tensor.dtype.code) << 32 | tensor.dtype.bits << 16 | tensor.dtype.lanes;
    seen.ndim = tensor.ndim;
    return true;
  }

  std::vector<Seen> seen_;
  std::vector<int64_t> sides_;  // of each tensor its shape, then its strides
};

py::object snapshot(const py::list& tensors) {
  auto found = std::make_unique<Snapshot>();
  if (!api || !found->read(tensors)) return py::none();
  return py::cast(std::move(found));
}

// The attribute `name` of every object.
py::list attributes(const py::list& objects, const py::str& name) {
  const py::ssize_t size = PyList_GET_SIZE(objects.ptr());
  py::list found(size);
  for (py::ssize_t i = 0; i < size; ++i) {
    const py::object object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(objects.ptr(), i));
    PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!value) throw py::error_already_set();
    PyList_SET_ITEM(found.ptr(), i, value);
  }
  return found;
}

// Is the method true of any object?
bool any_is(const py::list& objects, const py::object& method) {
  for (py::ssize_t i = 0; i < PyList_GET_SIZE(objects.ptr()); ++i) {
    PyObject* const object = PyList_GET_ITEM(objects.ptr(), i);
    const py::object said = py::reinterpret_steal<py::object>(PyObject_CallOneArg(method.ptr(), object));
    if (!said) throw py::error_already_set();
    if (said.ptr() == Py_True) return true;
  }
  return false;
}

bool holds_none(const py::list& objects) {
  for (py::ssize_t i = 0; i < PyList_GET_SIZE(objects.ptr()); ++i) {
    if (PyList_GET_ITEM(objects.ptr(), i) == Py_None) return true;
  }
  return false;
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
      .def("compare", &Snapshot::compare, py::arg("tensors"),
           "2 where these are the same, 1 where they agree in all but addresses, else 0.")
      .def_property_readonly("addresses", &Snapshot::addresses);
  m.def("snapshot", &snapshot, py::arg("tensors"), "A Snapshot; None where one of them cannot be read as it lies.");
  m.def("attributes", &attributes, py::arg("objects"), py::arg("name"), "The attribute of every object.");
  m.def("any_is", &any_is, py::arg("objects"), py::arg("method"), "Whether the method is True of any object.");
  m.def("holds_none", &holds_none, py::arg("objects"), "Whether one of them is None.");
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
