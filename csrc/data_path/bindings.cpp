// The functions of data_path.h for Python, with the names and arguments of data/reference.py.
#include <optional>
#include <string>

#include <pybind11/stl.h>

#include "data_path.h"

namespace py = pybind11;

namespace bert_fast::data_path {
namespace {

template <class T>
void check_size(const char* name, const Array<T>& array, int64_t want) {
  if (array.ndim() != 1 || array.size() != want) {
    throw py::value_error(std::string(name) + ": want (" + std::to_string(want) + ",), got " +
                          std::string(py::str(array.attr("shape"))));
  }
}

// Where the examples stand; refused unless they are the T tokens, each once and in order.
Examples examples_of(const Array<int32_t>& cu_seqlens, int64_t total) {
  const Examples found{cu_seqlens.data(), cu_seqlens.size() - 1};
  bool fits = cu_seqlens.ndim() == 1 && found.count >= 0;
  fits = fits && found.cu[0] == 0 && found.cu[found.count] == total;
  for (int64_t b = 0; fits && b < found.count; ++b) fits = found.cu[b] <= found.cu[b + 1];
  if (!fits) {
    throw py::value_error("cu_seqlens: want (B + 1,) rising from 0 to " + std::to_string(total) +
                          ", got something else");
  }
  return found;
}

int64_t total_of(const Array<int32_t>& cu_seqlens) {
  return cu_seqlens.size() == 0 ? 0 : cu_seqlens.data()[cu_seqlens.size() - 1];
}

Array<int64_t> mask_ids(Array<int64_t> ids, const Array<int32_t>& cu_seqlens,
                        const std::optional<Array<int64_t>>& special, const Array<uint64_t>& index,
                        uint64_t seed, uint32_t epoch, const Array<uint8_t>& table, double share,
                        int64_t most, bool exact, bool words, int64_t mask_id, uint64_t mask_below,
                        uint64_t random_below, uint64_t num_random) {
  const Examples examples = examples_of(cu_seqlens, ids.size());
  check_size("ids", ids, ids.size());
  check_size("index", index, examples.count);
  check_size("table", table, table.size());
  if (special) check_size("special", *special, ids.size());
  const Rule rule{table.data(), table.size(), share,      most,         exact,
                  words,        mask_id,      mask_below, random_below, num_random};
  Array<int64_t> labels(ids.size());
  int64_t* ids_ptr = ids.mutable_data();
  const int64_t* special_ptr = special ? special->data() : nullptr;
  const uint64_t* index_ptr = index.data();
  int64_t* labels_ptr = labels.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    mask(ids_ptr, examples, special_ptr, index_ptr, seed, epoch, rule, labels_ptr);
  }
  return labels;
}

int64_t longest_of(const Array<int32_t>& cu_seqlens) {
  return longest(examples_of(cu_seqlens, total_of(cu_seqlens)));
}

Array<uint64_t> digests_of(const Array<int64_t>& ids, const Array<int32_t>& cu_seqlens) {
  const Examples examples = examples_of(cu_seqlens, ids.size());
  check_size("ids", ids, ids.size());
  Array<uint64_t> out(examples.count);
  const int64_t* ids_ptr = ids.data();
  uint64_t* out_ptr = out.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    digests(ids_ptr, examples, out_ptr);
  }
  return out;
}

Array<int64_t> positions_of(const Array<int32_t>& cu_seqlens) {
  const Examples examples = examples_of(cu_seqlens, total_of(cu_seqlens));
  Array<int64_t> out(total_of(cu_seqlens));
  int64_t* out_ptr = out.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    positions(examples, out_ptr);
  }
  return out;
}

Array<int64_t> padded(const Array<int64_t>& values, const Array<int32_t>& cu_seqlens,
                      int64_t length, int64_t fill, bool left) {
  const Examples examples = examples_of(cu_seqlens, values.size());
  check_size("values", values, values.size());
  for (int64_t b = 0; b < examples.count; ++b) {
    if (examples.length(b) <= length) continue;
    throw py::value_error("length: want at least " + std::to_string(examples.length(b)) +
                          ", got " + std::to_string(length));
  }
  Array<int64_t> out({static_cast<py::ssize_t>(examples.count), static_cast<py::ssize_t>(length)});
  const int64_t* values_ptr = values.data();
  int64_t* out_ptr = out.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    pad(values_ptr, examples, length, fill, left, out_ptr);
  }
  return out;
}

}  // namespace
}  // namespace bert_fast::data_path

void bind_data_path(py::module_& m) {
  using namespace bert_fast::data_path;
  auto sub = m.def_submodule("data_path", "bert_fast/data/reference.py, compiled.");
  sub.def("flatten", &flatten, py::arg("rows"), py::arg("name"), py::arg("low"), py::arg("high"),
          py::arg("booleans"), py::arg("like").noconvert());
  sub.def("longest", &longest_of, py::arg("cu_seqlens").noconvert());
  sub.def("positions", &positions_of, py::arg("cu_seqlens").noconvert());
  sub.def("pad", &padded, py::arg("values").noconvert(), py::arg("cu_seqlens").noconvert(),
          py::arg("length"), py::arg("fill"), py::arg("left"));
  sub.def("digests", &digests_of, py::arg("ids").noconvert(), py::arg("cu_seqlens").noconvert());
  sub.def("mask", &mask_ids, py::arg("ids").noconvert(), py::arg("cu_seqlens").noconvert(),
          py::arg("special").noconvert(), py::arg("index").noconvert(), py::arg("seed"),
          py::arg("epoch"), py::arg("table").noconvert(), py::arg("share"), py::arg("most"),
          py::arg("exact"), py::arg("words"), py::arg("mask_id"), py::arg("mask_below"),
          py::arg("random_below"), py::arg("num_random"));
}
