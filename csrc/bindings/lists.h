// Reads a call's keyword arguments: lists become checked integers, addresses, numbers and layouts.
//
// Addresses arrive as integers. What can be checked without reading them is checked here, and a bad call raises
// ValueError with the argument's name; that an address holds what it is said to hold is the caller's promise
// (hfac/backends/cpu.py).
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../ops.h"

namespace hfac {
namespace bindings {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
  throw std::invalid_argument(std::string(name) + ": " + why);
}

// An argument, or entry `index` of one, as a number or an address. Where it is none, TypeError says so of an argument,
// ValueError of an entry.
struct Value : py::handle {
  const char* name;
  py::ssize_t index = -1;

  int64_t integer() const {
    const long long found = PyLong_AsLongLong(ptr());
    if (found == -1 && PyErr_Occurred()) bad("an integer is needed");
    return found;
  }
  int64_t count() const {
    const int64_t found = integer();
    if (found < 0) bad("negative: " + std::to_string(found));
    return found;
  }
  double number() const {
    const double found = PyFloat_AsDouble(ptr());
    if (found == -1 && PyErr_Occurred()) bad("a number is needed");
    return found;
  }
  void* address() const {
    void* const found = PyLong_AsVoidPtr(ptr());
    if (!found && PyErr_Occurred()) bad("an address is needed");
    return found;
  }
  [[noreturn]] void bad(const std::string& why) const {
    PyErr_Clear();
    if (index < 0) throw py::type_error(std::string(name) + ": " + why);
    refuse(name, "entry " + std::to_string(index) + ": " + why);
  }
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
  // One value for all parameters, or a list with one per parameter.
  static List each(const py::object& value, const char* name, py::ssize_t size) {
    const bool one = PyNumber_Check(value.ptr()) && !PySequence_Check(value.ptr());
    List list(one ? py::make_tuple(value) : value, name, -1);
    list.same_ = list.size_ == 1;
    return list.same_ ? list : List(value, name, size);
  }

  const char* name() const { return name_; }
  py::ssize_t size() const { return size_; }
  Value operator[](py::ssize_t i) const {
    const py::ssize_t k = same_ ? 0 : i;
    return {PySequence_Fast_GET_ITEM(fast_.ptr(), k), name_, k};
  }

  int64_t integer(py::ssize_t i) const { return (*this)[i].integer(); }
  int64_t count(py::ssize_t i) const { return (*this)[i].count(); }
  double number(py::ssize_t i) const { return (*this)[i].number(); }
  void* address(py::ssize_t i, bool needed) const {
    void* const found = (*this)[i].address();
    if (!found && needed) bad(i, "a null address for a tensor that is not empty");
    return found;
  }
  DType dtype(py::ssize_t i) const {
    const int64_t code = integer(i);
    if (code < 0 || code >= kDTypes) bad(i, "unknown dtype code " + std::to_string(code));
    return static_cast<DType>(code);
  }
  [[noreturn]] void bad(py::ssize_t i, const std::string& why) const { (*this)[i].bad(why); }

 private:
  const char* name_;
  py::object fast_;
  py::ssize_t size_;
  bool same_ = false;
};

// A name, which is a literal, as Python's string: made once, so that a dict finds it by identity.
inline PyObject* interned(const char* name) {
  thread_local std::unordered_map<const char*, PyObject*> known;
  PyObject*& found = known[name];
  if (!found) found = PyUnicode_InternFromString(name);
  if (!found) throw py::error_already_set();
  return found;
}

// Keyword arguments, or a dict of them. Each is taken once, by its name; `done` refuses what nobody took. TypeError
// says of which one argument is missing, unexpected or of another type.
class Keywords {
 public:
  explicit Keywords(const py::dict& given) : given_(given) {}

  py::object take(const char* name, py::handle otherwise = {}) {
    asked_.at(count_++) = name;
    py::handle found = PyDict_GetItemWithError(given_.ptr(), interned(name));
    found_ += found ? 1 : 0;
    if (!found) found = otherwise;
    if (!found) throw py::type_error("missing the keyword argument '" + std::string(name) + "'");
    return py::reinterpret_borrow<py::object>(found);
  }
  py::object optional(const char* name) { return take(name, py::none()); }
  // Nothing where it is None, or not given.
  std::optional<List> optional_list(const char* name, py::ssize_t size) {
    const py::object value = optional(name);
    return value.is_none() ? std::nullopt : std::optional<List>(List(value, name, size));
  }

  double number(const char* name) { return Value{take(name), name}.number(); }
  std::optional<double> optional_number(const char* name) {
    const py::object value = take(name);
    return value.is_none() ? std::nullopt : std::optional<double>(Value{value, name}.number());
  }
  bool flag(const char* name, py::handle otherwise = {}) {
    const py::object value = take(name, otherwise);
    const int truth = PyNumber_Check(value.ptr()) ? PyObject_IsTrue(value.ptr()) : -1;
    if (truth < 0) Value{value, name}.bad("a bool is needed");
    return truth;
  }
  int64_t integer(const char* name, int64_t otherwise) {
    return Value{take(name, py::int_(otherwise)), name}.integer();
  }
  std::string text(const char* name, py::handle otherwise = {}) {
    const py::object value = take(name, otherwise);
    if (!py::isinstance<py::str>(value)) Value{value, name}.bad("a string is needed");
    return py::cast<std::string>(value);
  }
  // Null where it is not given.
  template <class T>
  T* address(const char* name) {
    return static_cast<T*>(Value{take(name, py::int_(0)), name}.address());
  }

  void done() const {
    if (found_ == given_.size()) return;
    for (const auto& item : given_) {
      const auto name = py::cast<std::string>(item.first);
      bool asked = false;
      for (size_t i = 0; i < count_; ++i) asked = asked || name == asked_[i];
      if (!asked) throw py::type_error("unexpected keyword argument '" + name + "'");
    }
  }

 private:
  const py::dict& given_;
  std::array<const char*, 64> asked_;
  size_t count_ = 0, found_ = 0;
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
  const Strided* layout(const py::handle& strides, const char* name, py::ssize_t i, int64_t numel,
                        const std::optional<List>& shapes) {
    if (strides.is_none()) return nullptr;
    if (!shapes) refuse("shapes", "needed where " + std::string(name) + " is given");
    Strided s{counts((*shapes)[i], "shapes"), counts(strides, name)};
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
  // From a list in which contiguous tensors have None.
  const Strided* layout(const std::optional<List>& strides, py::ssize_t i, int64_t numel,
                        const std::optional<List>& shapes) {
    return strides ? layout((*strides)[i], strides->name(), i, numel, shapes) : nullptr;
  }
};

// Tensors by address, with their types and, where not contiguous, strides.
class Tensors {
 public:
  Tensors(Keywords& k, const char* name, const char* dtypes, const char* strides, py::ssize_t size)
      : addresses_(k.take(name), name, size),
        dtypes_(List::each(k.take(dtypes), dtypes, addresses_.size())),
        strides_(k.optional_list(strides, addresses_.size())) {}

  py::ssize_t size() const { return addresses_.size(); }
  TensorRef at(py::ssize_t i, int64_t numel, const std::optional<List>& shapes, Kept& kept) const {
    return {addresses_.address(i, numel > 0), dtypes_.dtype(i), kept.layout(strides_, i, numel, shapes)};
  }

 private:
  List addresses_, dtypes_;
  std::optional<List> strides_;
};

}  // namespace bindings
}  // namespace hfac
