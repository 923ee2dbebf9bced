// What the bindings' arguments are read with: lists become checked integers, addresses and layouts.
//
// Addresses arrive as integers. What can be checked without reading them is checked here, and a bad call raises
// ValueError with the argument's name; that an address holds what it is said to hold is the caller's promise
// (hfac/backends/cpu.py).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/ops.h"

namespace hfac {
namespace bindings {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
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

// How the `numel` elements of an entry lie that has `strides`; without a check of what lies there.
inline Strided strided(const py::handle& strides, const char* name, py::ssize_t size, py::ssize_t i, int64_t numel,
                       const py::object& shapes) {
  if (shapes.is_none()) refuse("shapes", "needed where " + std::string(name) + " is given");
  Strided s;
  s.sizes = counts(List(shapes, "shapes", size)[i], "shapes");
  s.strides = counts(strides, name);
  if (s.sizes.size() != s.strides.size()) {
    refuse(name, "entry " + std::to_string(i) + ": not as many as dimensions");
  }
  int64_t elements = 1;
  for (const int64_t d : s.sizes) elements = product(elements, d, "shapes");
  if (elements != numel) {
    refuse("shapes", "entry " + std::to_string(i) + ": " + std::to_string(elements) + " elements, numels has " +
                         std::to_string(numel));
  }
  return s;
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

  TensorRef at(py::ssize_t i, const List& numels, const py::object& shapes, bool empty = false) {
    return {addresses_.address(i, !empty), dtypes_.dtype(i), strided(i, numels, shapes)};
  }

 private:
  const Strided* strided(py::ssize_t i, const List& numels, const py::object& shapes) {
    if (strides_.is_none()) return nullptr;
    const py::handle mine = List(strides_, strides_name_, size())[i];
    if (mine.is_none()) return nullptr;
    layouts_.push_back(bindings::strided(mine, strides_name_, size(), i, numels.count(i), shapes));
    return &layouts_.back();
  }

  List addresses_;
  PerParameter dtypes_;
  py::object strides_;
  const char* strides_name_;
  std::deque<Strided> layouts_;  // addresses of its entries stay valid as it grows
};

// What a call is told of parameters that are more than rounded to the nearest (hfac/rounding.py); nothing where they
// are not. All by keyword:
//   master_lows    addresses of the lower pieces of bfloat16 parameters, of `low_bytes` (1 or 2) per element;
//   low_strides    of those, or None, as param_strides; needs shapes;
//   positions      of parameters that are rounded stochastically, by the random bits of `seed` and `step`;
//   place_firsts   the first element's index in its whole parameter (default: 0);
//   place_strides  of the indices, one per dimension, or None where they follow each other; needs shapes.
class Storing {
 public:
  Storing(const py::kwargs& given, py::ssize_t size) : size_(size) {
    if (given.empty()) return;
    for (const auto& item : given) {
      const auto name = py::cast<std::string>(item.first);
      py::object* const to = slot(name);
      if (!to) throw py::type_error("unexpected keyword argument '" + name + "'");
      *to = py::reinterpret_borrow<py::object>(item.second);
    }
    if (!lows_.is_none()) {
      low_bytes_ = PyLong_AsLongLong(low_bytes_given_.ptr());
      if (low_bytes_ == -1) PyErr_Clear();
      if (low_bytes_ != 1 && low_bytes_ != 2) refuse("low_bytes", "1 or 2 is needed where master_lows is given");
    }
    if (!positions_.is_none()) {
      seed_ = PyLong_AsUnsignedLongLong(PyLong_Check(seed_given_.ptr()) ? seed_given_.ptr() : py::int_(-1).ptr());
      if (PyErr_Occurred()) {
        PyErr_Clear();
        refuse("seed", "an integer in [0, 2^64) is needed where positions is given");
      }
      if (step_.is_none()) refuse("step", "needed where positions is given");
    }
  }

  // Of entry i; null where it is rounded to the nearest.
  const Stored* at(py::ssize_t i, DType dtype, const List& numels, const py::object& shapes, bool empty) {
    const bool pieces = !lows_.is_none(), drawn = !positions_.is_none();
    if (!pieces && !drawn) return nullptr;
    Stored s{};
    if (pieces) {
      const List lows(lows_, "master_lows", size_);
      if (dtype != DType::kBFloat16) lows.bad(i, "of a parameter that is no bfloat16");
      s.low = lows.address(i, !empty);
      s.low_bytes = low_bytes_;
      s.low_strided = strided(low_strides_, "low_strides", i, numels, shapes);
    }
    if (drawn) {
      const List positions(positions_, "positions", size_);
      if (dtype != DType::kBFloat16 && dtype != DType::kFloat16)
        positions.bad(i, "of a parameter of more than 16 bits");
      s.stochastic = true;
      s.key = {word(PerParameter(step_, "step", size_).number(i), "step", i),
               word(static_cast<double>(positions.integer(i)), "positions", i), seed_};
      s.first = firsts_.is_none() ? 0 : List(firsts_, "place_firsts", size_).count(i);
      s.strided = strided(strides_, "place_strides", i, numels, shapes);
      check_end(s, numels.count(i), i);
    }
    stored_.push_back(s);
    return &stored_.back();
  }

 private:
  py::object* slot(const std::string& name) {
    const std::pair<const char*, py::object*> slots[] = {
        {"master_lows", &lows_},        {"low_bytes", &low_bytes_given_},
        {"low_strides", &low_strides_}, {"positions", &positions_},
        {"place_firsts", &firsts_},     {"place_strides", &strides_},
        {"seed", &seed_given_},         {"step", &step_},
    };
    for (const auto& [known, to] : slots) {
      if (name == known) return to;
    }
    return nullptr;
  }

  const Strided* strided(const py::object& strides, const char* name, py::ssize_t i, const List& numels,
                         const py::object& shapes) {
    if (strides.is_none()) return nullptr;
    const py::handle mine = List(strides, name, size_)[i];
    if (mine.is_none()) return nullptr;
    layouts_.push_back(bindings::strided(mine, name, size_, i, numels.count(i), shapes));
    return &layouts_.back();
  }

  static uint32_t word(double value, const char* name, py::ssize_t i) {
    if (!(value >= 0 && value < 4294967296.0)) {
      refuse(name, "entry " + std::to_string(i) + ": a number in [0, 2^32) is needed");
    }
    return static_cast<uint32_t>(value);
  }

  // The last element's index must be a number still.
  static void check_end(const Stored& s, int64_t numel, py::ssize_t i) {
    int64_t end = s.first;
    bool over = !s.strided && __builtin_add_overflow(end, numel, &end);
    for (size_t d = 0; s.strided && d < s.strided->sizes.size(); ++d) {
      int64_t along = 0;
      over |= __builtin_mul_overflow(s.strided->sizes[d], s.strided->strides[d], &along) ||
              __builtin_add_overflow(end, along, &end);
    }
    if (over) refuse("place_firsts", "entry " + std::to_string(i) + ": the elements' indices overflow");
  }

  py::ssize_t size_;
  py::object lows_ = py::none(), low_bytes_given_ = py::none(), low_strides_ = py::none(), positions_ = py::none(),
             firsts_ = py::none(), strides_ = py::none(), seed_given_ = py::none(), step_ = py::none();
  int64_t low_bytes_ = 0;
  uint64_t seed_ = 0;
  std::deque<Strided> layouts_;
  std::deque<Stored> stored_;
};

// The arguments that every step has: parameters and gradients.
class Operands {
 public:
  Operands(const py::object& params, const py::object& grads, const py::object& numels, const py::object& param_dtypes,
           const py::object& grad_dtypes, const py::object& shapes, const py::object& param_strides,
           const py::object& grad_strides, const py::kwargs& storing)
      : params_(params, "params", -1, param_dtypes, "param_dtypes", param_strides, "param_strides"),
        grads_(grads, "grads", size(), grad_dtypes, "grad_dtypes", grad_strides, "grad_strides"),
        numels_(numels, "numels", size()),
        shapes_(shapes),
        storing_(storing, size()) {}

  py::ssize_t size() const { return params_.size(); }
  int64_t numel(py::ssize_t i) const { return numels_.count(i); }
  TensorRef param(py::ssize_t i, bool empty = false) {
    TensorRef param = params_.at(i, numels_, shapes_, empty);
    param.stored = storing_.at(i, param.dtype, numels_, shapes_, empty);
    return param;
  }
  TensorRef grad(py::ssize_t i, bool empty = false) { return grads_.at(i, numels_, shapes_, empty); }

 private:
  Tensors params_, grads_;
  List numels_;
  py::object shapes_;
  Storing storing_;
};

inline void* optional(const py::object& list, const char* name, py::ssize_t size, py::ssize_t i) {
  return list.is_none() ? nullptr : List(list, name, size).address(i, true);
}

inline int64_t matrix(const List& rows, const List& cols, py::ssize_t i, int64_t numel) {
  const int64_t elements = product(rows.count(i), cols.count(i), "rows");
  if (elements != numel) {
    refuse("rows", "entry " + std::to_string(i) + ": rows * cols is " + std::to_string(elements) + ", numels has " +
                       std::to_string(numel));
  }
  return elements;
}

// Where the `numel` elements of a part lie in a matrix of `rows` rows and `cols` columns: 7 numbers for each block.
inline std::vector<SmmfBlock> blocks(const py::handle& value, int64_t numel, int64_t rows, int64_t cols) {
  const char* name = "blocks";
  const List list(py::reinterpret_borrow<py::object>(value), name, -1);
  std::vector<SmmfBlock> out;
  out.reserve(static_cast<size_t>(list.size()));
  int64_t elements = 0;
  for (py::ssize_t b = 0; b < list.size(); ++b) {
    const List numbers(py::reinterpret_borrow<py::object>(list[b]), name, -1);
    if (numbers.size() != 7) list.bad(b, "7 numbers are needed, not " + std::to_string(numbers.size()));
    const SmmfBlock block{numbers.count(0), numbers.count(1), numbers.count(2), numbers.count(3),
                          numbers.count(4), numbers.count(5), numbers.count(6)};
    if (block.rows == 0 || block.cols == 0) list.bad(b, "no elements");
    const bool many = block.rows > 1;
    if (many && (block.stride < block.cols || block.row_step == 0)) list.bad(b, "its rows overlap");
    const int64_t last = many ? product(block.rows - 1, block.stride, name) : 0;
    const int64_t last_row = many ? product(block.rows - 1, block.row_step, name) : 0;
    // Each comparison leaves out what the one before has shown to fit, so that no sum overflows.
    if (block.first > numel || last > numel - block.first || block.cols > numel - block.first - last) {
      list.bad(b, "it ends beyond the part's " + std::to_string(numel) + " elements");
    }
    if (block.row >= rows || last_row >= rows - block.row || block.col > cols || block.cols > cols - block.col) {
      list.bad(b, "it leaves the matrix of " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    elements += block.rows * block.cols;
    if (elements > numel) list.bad(b, "more elements than the part's " + std::to_string(numel));
    out.push_back(block);
  }
  if (elements != numel) {
    refuse(name, std::to_string(elements) + " elements, but the part has " + std::to_string(numel));
  }
  return out;
}

// How the sign bits of a parameter of `numel` elements lie: `bytes` of them, in `slices` slices of the first dimension
// (0 where the number does not matter because the bytes say all: whole bytes throughout, or one element per byte).
inline Signs signs(void* data, int64_t bytes, int64_t slices, int64_t numel, py::ssize_t i) {
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

}  // namespace bindings
}  // namespace hfac
