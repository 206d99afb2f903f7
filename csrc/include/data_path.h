// From lists of ids to a masked batch: the steps of bert_fast/data/reference.py, bit for bit.
//
// The T tokens of B examples stand behind one another; cu_seqlens (B + 1,) says where. Nothing but
// the bindings knows Python: the rest runs without its lock.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <pybind11/numpy.h>

namespace bert_fast::data_path {

// Of Python; taken as it is or refused, as a converted copy could not be changed in place.
template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// Where the examples of a batch stand.
struct Examples {
  const int32_t* cu;  // (B + 1,)
  int64_t count;      // B

  int64_t start(int64_t b) const { return cu[b]; }
  int64_t length(int64_t b) const { return cu[b + 1] - cu[b]; }
};

enum : uint8_t { kSpecial = 1, kContinues = 2 };  // of an id, in Rule::table
constexpr int64_t kIgnore = -100;                 // label of a token that is not predicted

// How tokens are chosen and what replaces them: the arguments of reference.mask.
struct Rule {
  const uint8_t* table;  // (V,)
  int64_t num_ids;       // V
  double share;
  int64_t most;
  bool exact;
  bool words;
  int64_t mask_id;
  uint64_t mask_below;
  uint64_t random_below;
  uint64_t num_random;
};

// ids (T,), special (T,) or null, index (B,) -> labels (T,); ids are changed in place.
// Throws std::invalid_argument, before any change, where an id has no entry in the table.
void mask(int64_t* ids, const Examples& examples, const int64_t* special, const uint64_t* index,
          uint64_t seed, uint32_t epoch, const Rule& rule, int64_t* labels);

// -> the length of the longest example; 0 without one.
int64_t longest(const Examples& examples);

// ids (T,) -> digests (B,).
void digests(const int64_t* ids, const Examples& examples, uint64_t* out);

// -> positions (T,).
void positions(const Examples& examples, int64_t* out);

// values (T,) -> rows (B, length), with `fill` on the left or on the right.
void pad(const int64_t* values, const Examples& examples, int64_t length, int64_t fill, bool left,
         int64_t* out);

// Rows of Python -> (values (T,) int64, cu_seqlens (B + 1,) int32, which is `like` if given).
pybind11::tuple flatten(const pybind11::sequence& rows, const std::string& name, int64_t low,
                        int64_t high, bool booleans, const std::optional<Array<int32_t>>& like);

}  // namespace bert_fast::data_path

// Add the functions to the module `m`, as its submodule data_path.
void bind_data_path(pybind11::module_& m);
