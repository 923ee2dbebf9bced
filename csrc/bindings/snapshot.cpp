// What a list of tensors is in memory, in one call: a warm step compares it with what an earlier step validated.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "items.h"
#include "torch_abi.h"

namespace hfac {
namespace bindings {
namespace {

// How tensors are read: `types` are those of Python whose objects are known to have memory and a handle.
struct Reader {
  torch_abi::Functions torch{};
  torch_abi::Places places{};
  int32_t strided = 0;
  std::vector<PyTypeObject*> types;  // torch's, which stay

  bool reads(PyTypeObject* type) const { return std::find(types.begin(), types.end(), type) != types.end(); }
};
Reader reader;

constexpr uint32_t kMostSides = 8;

template <class F>
void set(F& function, const py::dict& addresses, const char* name) {
  function = reinterpret_cast<F>(py::cast<uintptr_t>(addresses[name]));
}

// Snapshots can be taken from now on.
void read_tensors_with(const py::dict& functions, const std::array<uint32_t, 9>& places, int32_t strided,
                       const py::list& types) {
  const auto [handle, storage, sizes, strides, offset, types_at, keys, data, deleter] = places;
  if (!(sizes < strides && strides - sizes - 1 <= kMostSides)) {
    refuse("places", "room for at most 8 sizes is needed between sizes and strides");
  }
  Reader made;
  set(made.torch.layout, functions, "layout");
  set(made.torch.data_ptr, functions, "data_ptr");
  made.places = {handle, storage, sizes, strides, offset, types_at, keys, data, deleter};
  made.strided = strided;
  for (const py::handle type : types) made.types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  reader = made;
}

// How the tensors of a list are now, beside what a snapshot says of those of an earlier one.
enum Likeness { kOther, kAlike, kSame };

// Of every tensor its Python type, device, element type, shape, strides and keys, and where it lies. Never changes.
class Snapshot {
 public:
  // False, with nothing raised, where one of the objects is no tensor that has elements in memory, or one of more
  // dimensions than are kept beside its type.
  bool read(const py::list& tensors) {
    const py::ssize_t size = PyList_GET_SIZE(tensors.ptr());
    std::map<Kind, uint32_t> known;
    seen_.reserve(static_cast<size_t>(size));
    addresses_.reserve(static_cast<size_t>(size));
    for (py::ssize_t i = 0; i < size; ++i) {
      PyObject* const object = PyList_GET_ITEM(tensors.ptr(), i);
      if (!reader.reads(Py_TYPE(object))) return false;
      const torch_abi::Handle handle = torch_abi::handle_of(object, reader.places.handle);
      const uint64_t* const tensor = implementation_of(object);
      const uint64_t* const sizes = tensor + reader.places.sizes;  // behind their number
      int32_t layout;
      void* address;
      if (sizes[0] > reader.places.room() || reader.torch.layout(handle, &layout) || layout != reader.strided ||
          reader.torch.data_ptr(handle, &address)) {
        return false;
      }
      // With elements, but without memory: zeros, or what has been freed.
      if (!address && std::find(sizes + 1, sizes + 1 + sizes[0], 0) == sizes + 1 + sizes[0]) return false;
      const auto [at, is_new] = known.emplace(Kind(Py_TYPE(object), tensor), static_cast<uint32_t>(kinds_.size()));
      if (is_new) kinds_.push_back(at->first);
      seen_.push_back({data_of(tensor), tensor[reader.places.offset], tensor, storage_of(tensor), at->second});
      addresses_.push_back(address);
    }
    return true;
  }

  // kSame: everything is as it was; kAlike: all but addresses. Nothing is kept of the list.
  int compare(PyObject* tensors) const {
    const size_t size = seen_.size();
    if (PyList_GET_SIZE(tensors) != static_cast<py::ssize_t>(size)) return kOther;
    int found = kSame;
    for (size_t i = 0; i < size; ++i) {
      if (i + kAhead < size) seen_[i + kAhead].fetch(PyList_GET_ITEM(tensors, static_cast<py::ssize_t>(i + kAhead)));
      const Seen& then = seen_[i];
      const Kind& kind = kinds_[then.kind];
      PyObject* const object = PyList_GET_ITEM(tensors, static_cast<py::ssize_t>(i));
      if (Py_TYPE(object) != kind.type) return kOther;
      const uint64_t* const tensor = implementation_of(object);
      if (!kind.is_of(tensor)) return kOther;
      if (data_of(tensor) != then.data || tensor[reader.places.offset] != then.offset) found = kAlike;
    }
    return found;
  }

  py::list addresses() const {
    py::list found;
    for (const void* const one : addresses_) found.append(reinterpret_cast<uintptr_t>(one));
    return found;
  }

 private:
  // What tensors of a list have in common; there are few kinds.
  struct Kind {
    PyTypeObject* type;
    uint64_t types, keys;
    uint64_t deleter;  // another one where the memory is to be copied before it is written, or has been freed
    uint64_t ndim;
    std::array<uint64_t, 2 * kMostSides> sides{};  // sizes and strides, then zeros

    Kind(PyTypeObject* of, const uint64_t* tensor)
        : type(of),
          types(tensor[reader.places.types] & torch_abi::kTypeBits),
          keys(tensor[reader.places.keys]),
          deleter(deleter_of(tensor)),
          ndim(tensor[reader.places.sizes]) {
      std::copy_n(tensor + reader.places.sizes + 1, ndim, sides.begin());
      std::copy_n(tensor + reader.places.strides, ndim, sides.begin() + ndim);
    }
    bool is_of(const uint64_t* tensor) const {
      const uint64_t* const size = tensor + reader.places.sizes + 1;
      const uint64_t* const stride = tensor + reader.places.strides;
      uint64_t differing = (tensor[reader.places.types] & torch_abi::kTypeBits) ^ types;
      differing |= (tensor[reader.places.keys] ^ keys) | (tensor[reader.places.sizes] ^ ndim);
      for (uint64_t d = 0; d < ndim; ++d) differing |= (size[d] ^ sides[d]) | (stride[d] ^ sides[ndim + d]);
      return differing == 0 && deleter == deleter_of(tensor);  // others may have no storage
    }
    bool operator<(const Kind& other) const {
      return std::tie(type, types, keys, deleter, ndim, sides) <
             std::tie(other.type, other.types, other.keys, other.deleter, other.ndim, other.sides);
    }
  };
  struct Seen {
    const void* data;  // where the storage begins
    uint64_t offset;
    const uint64_t *tensor, *storage;  // where these were; what lies there now may be anything
    uint32_t kind;

    // Asks for the memory that `compare` will read if the tensor is still the same one. Of thousands of tensors little
    // is in a cache, and each address would otherwise be known only when the one before it has been read.
    void fetch(const PyObject* object) const {
      constexpr uint32_t kLine = 64 / sizeof(*tensor);
      __builtin_prefetch(object);
      for (uint32_t word = reader.places.storage; word <= reader.places.keys; word += kLine) {
        __builtin_prefetch(tensor + word);
      }
      __builtin_prefetch(storage + reader.places.data);
    }
  };
  static constexpr size_t kAhead = 6;  // tensors; 2 to 8 take the same time, 16 and more longer

  static const uint64_t* implementation_of(PyObject* tensor) { return torch_abi::at(tensor, reader.places.handle); }
  static const uint64_t* storage_of(const uint64_t* tensor) { return torch_abi::at(tensor, reader.places.storage); }
  static const uint64_t* data_of(const uint64_t* tensor) {
    return torch_abi::at(storage_of(tensor), reader.places.data);
  }
  static uint64_t deleter_of(const uint64_t* tensor) { return storage_of(tensor)[reader.places.deleter]; }

  std::vector<Kind> kinds_;
  std::vector<Seen> seen_;
  std::vector<const void*> addresses_;
};

py::object snapshot(const py::list& tensors) {
  auto found = std::make_unique<Snapshot>();
  if (!found->read(tensors)) return py::none();
  return py::cast(std::move(found));
}

// How tensors are beside a Snapshot, or another object with its methods.
PyObject* compare(PyObject* tensors, PyObject* before) {
  if (before == Py_None) return PyLong_FromLong(kOther);
  if (!py::isinstance<Snapshot>(before)) return PyObject_CallMethod(before, "compare", "O", tensors);
  return PyLong_FromLong(py::cast<const Snapshot&>(py::handle(before)).compare(tensors));
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
PyObject* values_are(PyObject* dicts, PyObject* objects) {
  const py::ssize_t count = PyList_GET_SIZE(dicts), size = PyList_GET_SIZE(objects);
  py::ssize_t k = 0;
  bool same = true;
  for (py::ssize_t i = 0; same && i < count; ++i) {
    PyObject* const dict = PyList_GET_ITEM(dicts, i);
    if (!PyDict_Check(dict)) Py_RETURN_FALSE;
    PyObject* value;
    py::ssize_t at = 0;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(dict);
#endif
    while (same && PyDict_Next(dict, &at, nullptr, &value)) {
      same = k < size && PyList_GET_ITEM(objects, k) == value;
      ++k;
    }
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
  }
  return PyBool_FromLong(same && k == size);
}

PyObject* identical(PyObject* now, PyObject* before) {
  const py::ssize_t size = PyList_GET_SIZE(now);
  bool same = size == PyList_GET_SIZE(before);
  for (py::ssize_t i = 0; same && i < size; ++i) same = PyList_GET_ITEM(now, i) == PyList_GET_ITEM(before, i);
  return PyBool_FromLong(same);
}

// A function of two lists, or of a list and another object, as Python calls it fastest: a step of one parameter calls
// these several times, and pybind would take longer than they do.
template <PyObject* (*function)(PyObject*, PyObject*), bool kLists>
PyObject* called(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count == 2 && PyList_Check(given[0]) && (!kLists || PyList_Check(given[1]))) return function(given[0], given[1]);
  PyErr_SetString(PyExc_TypeError, kLists ? "two lists are needed" : "a list and another object are needed");
  return nullptr;
}
template <PyObject* (*function)(PyObject*, PyObject*), bool kLists = true>
PyMethodDef method(const char* name, const char* doc) {
  const auto any = reinterpret_cast<void (*)()>(&called<function, kLists>);
  return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, doc};
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
  m.def(
      "read_tensors_with", &read_tensors_with, py::arg("functions"), py::arg("places"), py::arg("strided"),
      py::arg("types"),
      "Takes the addresses of torch's functions, and where tensors keep what describes them: (handle, storage, sizes, "
      "strides, offset, types, keys, data, deleter), in words of 8 bytes. With these snapshots are taken from now on.");
  py::class_<Snapshot>(m, "Snapshot", "What a list of tensors was in memory.")
      .def_property_readonly("addresses", &Snapshot::addresses);
  m.def("snapshot", &snapshot, py::arg("tensors"), "A Snapshot; None where one of them cannot be read as it lies.");
  m.def("attributes", &attributes, py::arg("objects"), py::arg("name"), "The attribute of every object.");
  m.def("holds_none", &holds_none, py::arg("objects"), "Whether one of them is None.");
  static PyMethodDef fast[] = {
      method<compare, false>(
          "compare",
          "(tensors, snapshot): 2 where these are the same, 1 where they agree in all but addresses, else 0."),
      method<values_are>("values_are",
                         "(dicts, objects): whether these are the values of the dicts, one after the other."),
      method<identical>("identical", "(now, before): whether two lists have the same objects."),
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), fast) != 0) throw py::error_already_set();
  py::class_<Counters>(m, "Counters", "Floats at addresses on the host, which count together.")
      .def(py::init<const py::object&>(), py::arg("addresses"))
      .def("common", &Counters::common, "What all of them are; None where they differ.")
      .def("advance", &Counters::advance, "Adds one to each.");
}

}  // namespace bindings
}  // namespace hfac
