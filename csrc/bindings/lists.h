// Reads a call's keyword arguments: lists become checked integers, addresses, numbers and layouts.
//
// Addresses arrive as integers. What can be checked without reading them is checked here, and a bad call raises
// ValueError with the argument's name; that an address holds what it is said to hold is the caller's promise
// (hfac/backends/cpu.py).
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../ops.h"

namespace hfac {
namespace bindings {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
  throw std::invalid_argument(std::string(name) + ": " + why);
}

// Keyword arguments. Each is taken once, by its name; `done` refuses what nobody took. TypeError says of which one
// argument is missing, unexpected or of another type.
class Keywords {
 public:
  explicit Keywords(const py::kwargs& given) : given_(given) { asked_.reserve(40); }

  py::object take(const char* name, py::handle otherwise = {}) {
    asked_.push_back(name);
    py::handle found = PyDict_GetItemString(given_.ptr(), name);
    found_ += found ? 1 : 0;
    if (!found) found = otherwise;
    if (!found) throw py::type_error("missing the keyword argument '" + std::string(name) + "'");
    return py::reinterpret_borrow<py::object>(found);
  }
  py::object optional(const char* name) { return take(name, py::none()); }

  double number(const char* name) { return number(take(name), name); }
  std::optional<double> optional_number(const char* name) {
    const py::object value = take(name);
    return value.is_none() ? std::nullopt : std::optional<double>(number(value, name));
  }
  bool flag(const char* name, py::handle otherwise = {}) {
    const py::object value = take(name, otherwise);
    const int truth = PyNumber_Check(value.ptr()) ? PyObject_IsTrue(value.ptr()) : -1;
    if (truth < 0) mistyped(name, "a bool");
    return truth;
  }
  int64_t integer(const char* name, int64_t otherwise) {
    const long long value = PyLong_AsLongLong(take(name, py::int_(otherwise)).ptr());
    if (value == -1 && PyErr_Occurred()) mistyped(name, "an integer");
    return value;
  }
  std::string text(const char* name, py::handle otherwise = {}) {
    const py::object value = take(name, otherwise);
    if (!py::isinstance<py::str>(value)) mistyped(name, "a string");
    return py::cast<std::string>(value);
  }
  // Null where it is not given.
  template <class T>
  T* address(const char* name) {
    void* const value = PyLong_AsVoidPtr(take(name, py::int_(0)).ptr());
    if (!value && PyErr_Occurred()) mistyped(name, "an address");
    return static_cast<T*>(value);
  }

  void done() const {
    if (found_ == given_.size()) return;
    for (const auto& item : given_) {
      const auto name = py::cast<std::string>(item.first);
      bool asked = false;
      for (const char* const one : asked_) asked = asked || name == one;
      if (!asked) throw py::type_error("unexpected keyword argument '" + name + "'");
    }
  }

 private:
  static double number(const py::object& value, const char* name) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1 && PyErr_Occurred()) mistyped(name, "a number");
    return number;
  }
  [[noreturn]] static void mistyped(const char* name, const char* needed) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": " + needed + " is needed");
  }

  const py::kwargs& given_;
  std::vector<const char*> asked_;
  size_t found_ = 0;
};

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
    if (code < 0 || code >= kDTypes) list_.bad(k, "unknown dtype code " + std::to_string(code));
    return static_cast<DType>(code);
  }

 private:
  List list_;
};

inline std::vector<int64_t> counts(const py::handle& value, const char* name) {
  const List list(py::reinterpret_borrow<py::object>(value), name, -1);
  std::vector<int64_t> out;
  for (py::ssize_t d = 0; d < list.size(); ++d) out.push_back(list.count(d));
  return out;
}

inline int64_t product(int64_t a, int64_t b, const char* name) {
  int64_t c;
  if (__builtin_mul_overflow(a, b, &c)) refuse(name, "the number of elements overflows");
  return c;
}

// What items point at.
struct Kept {
  std::deque<Strided> layouts;  // addresses of a deque's entries stay valid as it grows, and as it is moved
  std::deque<Storage> storages;
  std::deque<Shard> shards;

  // How the `numel` elements of entry i lie, from `strides`; null: one after the other. Does not check what lies there.
  const Strided* layout(const py::handle& strides, const char* name, py::ssize_t size, py::ssize_t i, int64_t numel,
                        const py::object& shapes) {
    if (strides.is_none()) return nullptr;
    if (shapes.is_none()) refuse("shapes", "needed where " + std::string(name) + " is given");
    Strided s{counts(List(shapes, "shapes", size)[i], "shapes"), counts(strides, name)};
    if (s.sizes.size() != s.strides.size()) {
      refuse(name, "entry " + std::to_string(i) + ": not as many as dimensions");
    }
    int64_t elements = 1;
    for (const int64_t d : s.sizes) elements = product(elements, d, "shapes");
    if (elements != numel) {
      refuse("shapes", "entry " + std::to_string(i) + ": " + std::to_string(elements) + " elements, numels has " +
                           std::to_string(numel));
    }
    layouts.push_back(std::move(s));
    return &layouts.back();
  }
};

// Strides by entry: a list in which contiguous tensors have None, or None.
class Strides {
 public:
  Strides() = default;
  Strides(Keywords& k, const char* name) : given_(k.optional(name)), name_(name) {}
  const Strided* at(py::ssize_t i, int64_t numel, py::ssize_t size, const py::object& shapes, Kept& kept) const {
    if (given_.is_none()) return nullptr;
    return kept.layout(List(given_, name_, size)[i], name_, size, i, numel, shapes);
  }

 private:
  py::object given_ = py::none();
  const char* name_ = "";
};

// Tensors by address, with their types and, where not contiguous, strides.
class Tensors {
 public:
  Tensors(Keywords& k, const char* name, const char* dtypes, const char* strides, py::ssize_t size)
      : addresses_(k.take(name), name, size),
        dtypes_(k.take(dtypes), dtypes, addresses_.size()),
        strides_(k, strides) {}

  py::ssize_t size() const { return addresses_.size(); }
  TensorRef at(py::ssize_t i, int64_t numel, const py::object& shapes, Kept& kept) const {
    return {addresses_.address(i, numel > 0), dtypes_.dtype(i), strides_.at(i, numel, size(), shapes, kept)};
  }

 private:
  List addresses_;
  PerParameter dtypes_;
  Strides strides_;
};

}  // namespace bindings
}  // namespace hfac
