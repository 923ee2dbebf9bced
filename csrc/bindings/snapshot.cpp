// What a list of tensors is in memory, in one call: a warm step compares it with what an earlier step validated.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "items.h"
#include "torch_abi.h"

namespace hfac {
namespace bindings {
namespace {

// How tensors are read: `types` are those of Python whose objects are known to have memory and a handle at `offset`.
struct Reader {
  torch_abi::Functions torch{};
  Py_ssize_t offset = 0;
  int32_t strided = 0;
  std::vector<PyTypeObject*> types;  // torch's, which stay

  bool reads(PyTypeObject* type) const { return std::find(types.begin(), types.end(), type) != types.end(); }
};
Reader reader;

// Where in a Python tensor the handle of its memory lies: the one word that is `cdata`, its address of the tensor's
// implementation; None where no word is, or several are.
py::object handle_offset(const py::object& tensor, uint64_t cdata) {
  py::object found = py::none();
  const Py_ssize_t size = Py_TYPE(tensor.ptr())->tp_basicsize;
  for (Py_ssize_t at = sizeof(PyObject); at + static_cast<Py_ssize_t>(sizeof(cdata)) <= size; at += sizeof(cdata)) {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(tensor.ptr()) + at, sizeof(word));
    if (word != cdata) continue;
    if (!found.is_none()) return py::none();
    found = py::int_(at);
  }
  return found;
}

template <class F>
void set(F& function, const py::dict& addresses, const char* name) {
  function = reinterpret_cast<F>(py::cast<uintptr_t>(addresses[name]));
}

// Snapshots can be taken from now on.
void read_tensors_with(const py::dict& functions, Py_ssize_t offset, int32_t strided, const py::list& types) {
  Reader made;
  set(made.torch.layout, functions, "layout");
  set(made.torch.dtype, functions, "dtype");
  set(made.torch.device_type, functions, "device_type");
  set(made.torch.device_index, functions, "device_index");
  set(made.torch.dim, functions, "dim");
  set(made.torch.sizes, functions, "sizes");
  set(made.torch.strides, functions, "strides");
  set(made.torch.data_ptr, functions, "data_ptr");
  made.offset = offset;
  made.strided = strided;
  for (const py::handle type : types) made.types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  reader = made;
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
      Seen seen;
      const int64_t *sizes, *strides;
      if (!look(PyList_GET_ITEM(tensors.ptr(), i), seen, sizes, strides)) return false;
      seen_.push_back(seen);
      sides_.insert(sides_.end(), sizes, sizes + seen.ndim);
      sides_.insert(sides_.end(), strides, strides + seen.ndim);
    }
    return true;
  }

  // kSame: everything is as it was; kAlike: all but addresses. kOther where the method `is_other`, if one is given, is
  // true of a tensor. Nothing is kept of the list.
  int compare(const py::list& tensors, const py::object& is_other) const {
    if (PyList_GET_SIZE(tensors.ptr()) != static_cast<py::ssize_t>(seen_.size())) return kOther;
    const int64_t* sides = sides_.data();
    int found = kSame;
    for (size_t i = 0; i < seen_.size(); ++i) {
      PyObject* const object = PyList_GET_ITEM(tensors.ptr(), static_cast<py::ssize_t>(i));
      Seen now;
      const int64_t *sizes, *strides;
      if (!look(object, now, sizes, strides)) return kOther;
      const Seen& then = seen_[i];
      if (now.type != then.type || now.device != then.device || now.dtype != then.dtype || now.ndim != then.ndim) {
        return kOther;
      }
      if (!std::equal(sides, sides + now.ndim, sizes)) return kOther;
      sides += now.ndim;
      if (!std::equal(sides, sides + now.ndim, strides)) return kOther;
      sides += now.ndim;
      if (now.address != then.address) found = kAlike;
      if (is_other.is_none()) continue;
      const py::object held = py::reinterpret_borrow<py::object>(object);  // whatever another thread does to the list
      const py::object said = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_other.ptr(), object));
      if (!said) throw py::error_already_set();
      // It may have let other threads run.
      if (said.ptr() == Py_True || PyList_GET_SIZE(tensors.ptr()) != static_cast<py::ssize_t>(seen_.size()))
        return kOther;
    }
    return found;
  }

  py::list addresses() const {
    py::list found;
    for (const Seen& one : seen_) found.append(reinterpret_cast<uintptr_t>(one.address));
    return found;
  }

 private:
  struct Seen {
    PyTypeObject* type;
    const void* address;
    int64_t device, ndim;
    int32_t dtype;
  };

  // False where this is no tensor that has its elements in memory, or of a type that may have none.
  static bool look(PyObject* object, Seen& seen, const int64_t*& sizes, const int64_t*& strides) {
    seen.type = Py_TYPE(object);
    if (!reader.reads(seen.type)) return false;
    const torch_abi::Handle tensor = torch_abi::handle_of(object, reader.offset);
    const torch_abi::Functions& torch = reader.torch;
    int32_t layout, type, index;
    int64_t *size, *stride;
    void* address;
    if (torch.layout(tensor, &layout) || layout != reader.strided || torch.dtype(tensor, &seen.dtype) ||
        torch.device_type(tensor, &type) || torch.device_index(tensor, &index) || torch.dim(tensor, &seen.ndim) ||
        torch.sizes(tensor, &size) || torch.strides(tensor, &stride) || torch.data_ptr(tensor, &address)) {
      return false;
    }
    if (!address) {
      int64_t elements = 1;
      for (int64_t d = 0; d < seen.ndim; ++d) elements *= size[d];
      if (elements > 0) return false;  // zeros without memory
    }
    seen.address = address;
    seen.device = static_cast<int64_t>(type) << 32 | static_cast<uint32_t>(index);
    sizes = size;
    strides = stride;
    return true;
  }

  std::vector<Seen> seen_;
  std::vector<int64_t> sides_;  // of each tensor its shape, then its strides
};

py::object snapshot(const py::list& tensors) {
  auto found = std::make_unique<Snapshot>();
  if (!found->read(tensors)) return py::none();
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
  m.def("handle_offset", &handle_offset, py::arg("tensor"), py::arg("cdata"),
        "Where in a tensor the word lies that is cdata; None where no word is, or several are.");
  m.def("read_tensors_with", &read_tensors_with, py::arg("functions"), py::arg("offset"), py::arg("strided"),
        py::arg("types"), "Takes the addresses of torch's functions, with which snapshots are taken from now on.");
  py::class_<Snapshot>(m, "Snapshot", "What a list of tensors was in memory.")
      .def("compare", &Snapshot::compare, py::arg("tensors"), py::arg("is_other") = py::none(),
           "2 where these are the same, 1 where they agree in all but addresses, else 0; 0 where is_other(tensor) is "
           "True "
           "of one.")
      .def_property_readonly("addresses", &Snapshot::addresses);
  m.def("snapshot", &snapshot, py::arg("tensors"), "A Snapshot; None where one of them cannot be read as it lies.");
  m.def("attributes", &attributes, py::arg("objects"), py::arg("name"), "The attribute of every object.");
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
