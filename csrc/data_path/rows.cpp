// Lists of ids -> one array and cu_seqlens; what is made of these without looking at a vocabulary.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "data_path.h"

namespace py = pybind11;

namespace bert_fast::data_path {
namespace {

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// Reads rows of Python one by one; values out of int64's range become its ends.
class Reader {
 public:
  Reader(const std::string& name, bool booleans) : name_(name), booleans_(booleans) {}

  void read_list(const py::object& row, int64_t example, int64_t length, int64_t* out) const {
    const bool is_list = PyList_Check(row.ptr());
    PyObject *zero = zero_.ptr(), *one = one_.ptr();
    for (int64_t i = 0; i < length; ++i) {
      // to read a value may run Python code, which may change the list
      if (PySequence_Fast_GET_SIZE(row.ptr()) != length) {
        throw py::value_error(name_ + ": example " + std::to_string(example) +
                              " changed while it was read");
      }
      PyObject* value = is_list ? PyList_GET_ITEM(row.ptr(), i) : PyTuple_GET_ITEM(row.ptr(), i);
      // masks and types are made of two objects, which need not be looked into
      out[i] = value == zero                ? 0
               : value == one               ? 1
               : PyLong_CheckExact(value) ? to_int64(value)
                                            : other(value, example);
    }
  }

  void read_array(const py::array& row, int64_t example, int64_t length, int64_t* out) const {
    const char kind = row.dtype().kind();
    if (length != 0 && kind != 'i' && kind != 'u' && !(booleans_ && kind == 'b')) {
      throw py::type_error(name_ + ": want integers, got " + std::string(py::str(row.dtype())) +
                           " in example " + std::to_string(example));
    }
    const char order = row.dtype().attr("byteorder").cast<char>();
    if (order != '=' && order != '|') {
      return read_array(row.attr("astype")("int64"), example, length, out);
    }
    const auto* data = static_cast<const char*>(row.data());
    const int64_t stride = length == 0 ? 0 : row.strides(0);
    switch (row.itemsize() * (kind == 'i' ? -1 : 1)) {
      case -1: return copy<int8_t>(data, stride, length, out);
      case -2: return copy<int16_t>(data, stride, length, out);
      case -4: return copy<int32_t>(data, stride, length, out);
      case -8: return copy<int64_t>(data, stride, length, out);
      case 1: return copy<uint8_t>(data, stride, length, out);
      case 2: return copy<uint16_t>(data, stride, length, out);
      case 4: return copy<uint32_t>(data, stride, length, out);
      case 8: return copy<uint64_t>(data, stride, length, out);
    }
  }

 private:
  static int64_t to_int64(PyObject* value) {
    int overflow = 0;
    const int64_t got = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 ? got : overflow < 0 ? kLeast : kMost;
  }

  int64_t other(PyObject* borrowed, int64_t example) const {
    const auto value = py::reinterpret_borrow<py::object>(borrowed);
    if (booleans_ || !PyBool_Check(value.ptr())) {
      const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
      if (number) return to_int64(number.ptr());
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
    }
    throw py::type_error(name_ + ": want integers, got " + Py_TYPE(value.ptr())->tp_name +
                         " in example " + std::to_string(example));
  }

  template <class T>
  static void copy(const char* data, int64_t stride, int64_t length, int64_t* out) {
    for (int64_t i = 0; i < length; ++i) {
      T value;
      std::memcpy(&value, data + i * stride, sizeof value);  // it need not be aligned
      const bool above = sizeof(T) == 8 && value > T(0) && static_cast<int64_t>(value) < 0;
      out[i] = above ? kMost : static_cast<int64_t>(value);
    }
  }

  const std::string& name_;
  const bool booleans_;
  const py::int_ zero_{0}, one_{1};
};

bool is_list(const py::object& row) { return PyList_Check(row.ptr()) || PyTuple_Check(row.ptr()); }

void check_length(const std::string& name, int64_t length, int64_t want, int64_t example) {
  if (length == want) return;
  throw py::value_error(name + ": want " + std::to_string(want) + " values, got " +
                        std::to_string(length) + " in example " + std::to_string(example));
}

void check_range(const std::string& name, const py::object& row, const int64_t* values,
                 int64_t length, int64_t low, int64_t high, int64_t example) {
  bool fits = true;
  for (int64_t i = 0; i < length; ++i) fits &= low <= values[i] && values[i] < high;
  if (fits) return;
  int64_t i = 0;
  while (low <= values[i] && values[i] < high) ++i;
  py::object got = row[py::int_(i)];
  if (is_list(row)) got = py::module_::import("operator").attr("index")(got);
  throw py::value_error(name + ": want " + std::to_string(low) + " to " + std::to_string(high - 1) +
                        ", got " + std::string(py::str(got)) + " in example " +
                        std::to_string(example) + ", token " + std::to_string(i));
}

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

py::tuple flatten(const py::sequence& rows, const std::string& name, int64_t low, int64_t high,
                  bool booleans, const std::optional<Array<int32_t>>& like) {
  if (like && like->size() != static_cast<py::ssize_t>(rows.size()) + 1) {
    throw py::value_error(name + ": want " + std::to_string(like->size() - 1) + " rows, got " +
                          std::to_string(rows.size()));
  }
  // Held here: the rows stay what they are while their values are read.
  std::vector<py::object> kept;
  std::vector<int64_t> ends = {0};
  kept.reserve(rows.size());
  ends.reserve(rows.size() + 1);
  py::object asarray;
  for (const py::handle& given : rows) {
    auto row = py::reinterpret_borrow<py::object>(given);
    const auto b = static_cast<int64_t>(kept.size());
    if (!is_list(row)) {
      if (!py::isinstance<py::array>(row)) {
        if (!asarray) asarray = py::module_::import("numpy").attr("asarray");
        row = asarray(row);
      }
      const int64_t dims = py::reinterpret_borrow<py::array>(row).ndim();
      if (dims != 1) {
        throw py::value_error(name + ": want 1-D, got " + std::to_string(dims) +
                              "-D in example " + std::to_string(b));
      }
    }
    const auto length = static_cast<int64_t>(py::len(row));
    if (like) check_length(name, length, like->data()[b + 1] - like->data()[b], b);
    ends.push_back(ends.back() + length);
    kept.push_back(std::move(row));
  }
  if (ends.back() > std::numeric_limits<int32_t>::max()) {
    throw py::value_error(name + ": want less than 2**31 tokens in a batch, got " +
                          std::to_string(ends.back()));
  }
  Array<int64_t> values(ends.back());
  const Reader reader(name, booleans);
  for (size_t b = 0; b < kept.size(); ++b) {
    const int64_t length = ends[b + 1] - ends[b];
    int64_t* out = values.mutable_data() + ends[b];
    if (is_list(kept[b])) {
      reader.read_list(kept[b], b, length, out);
    } else {
      reader.read_array(py::reinterpret_borrow<py::array>(kept[b]), b, length, out);
    }
    check_range(name, kept[b], out, length, low, high, b);
  }
  if (like) return py::make_tuple(std::move(values), *like);
  Array<int32_t> cu_seqlens(static_cast<py::ssize_t>(ends.size()));
  std::copy(ends.begin(), ends.end(), cu_seqlens.mutable_data());
  return py::make_tuple(std::move(values), std::move(cu_seqlens));
}

int64_t longest(const Examples& examples) {
  int64_t most = 0;
  for (int64_t b = 0; b < examples.count; ++b) most = std::max(most, examples.length(b));
  return most;
}

void digests(const int64_t* ids, const Examples& examples, uint64_t* out) {
  for (int64_t b = 0; b < examples.count; ++b) {
    const int64_t* row = ids + examples.start(b);
    uint64_t sum = 0;
    for (int64_t i = 0; i < examples.length(b); ++i) {
      const uint64_t place = static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15;
      sum += mix(static_cast<uint64_t>(row[i]) + place);
    }
    out[b] = mix(sum);
  }
}

void positions(const Examples& examples, int64_t* out) {
  for (int64_t b = 0; b < examples.count; ++b) {
    for (int64_t i = 0; i < examples.length(b); ++i) *out++ = i;
  }
}

void pad(const int64_t* values, const Examples& examples, int64_t length, int64_t fill, bool left,
         int64_t* out) {
  for (int64_t b = 0; b < examples.count; ++b, out += length) {
    const int64_t n = examples.length(b);
    std::copy_n(values + examples.start(b), n, left ? out + length - n : out);
    std::fill_n(left ? out : out + n, length - n, fill);
  }
}

}  // namespace bert_fast::data_path
