// kdfast::bank_push, bank_panels and bank_in_step on the CPU: rows of a queue, and their packed copy.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::kPackedStep;
using kdfast::PackedBank;

// f(zero of the element type) for the matrices that kernels read.
template <class F>
void with_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f(float());
  if (x.scalar_type() == ScalarType::BFloat16) return f(torch::headeronly::BFloat16());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "a bank on the CPU takes float32, bfloat16 or float16");
  f(torch::headeronly::Half());
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// max(|x|, 1e-12), NaN where a number is. Sums in double, so that it is the same however they are ordered.
float length(const float* x, int64_t width) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    for (int i = 0; i < 8; ++i) sums[i] += double(x[d + i]) * double(x[d + i]);
  for (; d < width; ++d) sums[0] += double(x[d]) * double(x[d]);
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  const float norm = float(std::sqrt(sums[0]));
  return norm < 1e-12f ? 1e-12f : norm;
}

// bank[slot] = key / |key| in float, rounded to the bank's type.
template <class Stored, class Key>
void write_row(Stored* to, const Key* key, int64_t width, bool normalize, float* row) {
  for (int64_t d = 0; d < width; ++d) row[d] = float(key[d]);
  const float divisor = normalize ? length(row, width) : 1;
  for (int64_t d = 0; d < width; ++d) to[d] = Stored(row[d] / divisor);
}

// Which rows of the batch stay, in order, and how many came: of more than `capacity` the last stay.
std::vector<int64_t> rows_kept(const bool* where, int64_t count, int64_t capacity, int64_t* came) {
  std::vector<int64_t> kept;
  kept.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i)
    if (where == nullptr || where[i]) kept.push_back(i);
  *came = int64_t(kept.size());
  if (*came > capacity) kept.erase(kept.begin(), kept.end() - capacity);
  return kept;
}

// What lies from `from` on; of the bank itself, which would be written before it is read, a copy.
template <class From, class To>
const From* apart(const From* from, int64_t count, const To* to, int64_t size, std::vector<From>& copy) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (address(from) >= address(to + size) || address(to) >= address(from + count)) return from;
  copy.assign(from, from + count);
  return copy.data();
}

// Which rows of the batch are admitted; null: all.
const bool* admitted(const OptionalTensor& where, int64_t count) {
  if (!where.has_value()) return nullptr;
  check("where", *where, ScalarType::Bool, {count});
  STD_TORCH_CHECK(where->is_contiguous(), "where must be contiguous");
  return data<bool>(*where);
}

// ---- the packed copy ---------------------------------------------------------------------------------------------------

// How often `x` or another view of its memory was written to in place; -1: not counted (inference tensors).
int64_t version_of(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  if (torch_call_dispatcher("aten::_version", "", stack.data(), TORCH_ABI_VERSION) != 0) return -1;
  return torch::stable::detail::to<int64_t>(stack[0]);
}

PackedBank packed_bank(const Tensor& storage, int64_t version, int32_t* words) {
  STD_TORCH_CHECK(storage.dim() == 2 && storage.is_contiguous(), "storage must be contiguous, [rows, width]");
  check("storage", storage, storage.scalar_type(), {storage.size(0), storage.size(1)});
  return {matrix("bank", storage), storage.size(0), storage.size(1), version, words};
}

// Where `panels` are of the size that this bank's have; else nowhere.
int32_t* words_of(const PackedBank& bank, const Tensor& panels) {
  const bool fits = panels.is_cpu() && panels.scalar_type() == ScalarType::Int && panels.is_contiguous();
  const int64_t words = kdfast::cpu_kernels().packed_words(bank);
  return fits && words > 0 && panels.numel() == words ? static_cast<int32_t*>(panels.mutable_data_ptr()) : nullptr;
}

void write_packed(const PackedBank& bank, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin / kPackedStep, parts = (end + kPackedStep - 1) / kPackedStep - first;
  const int64_t workers = std::clamp<int64_t>(parts, 1, torch::stable::get_num_threads());
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.packed_workspace(bank);
  const Tensor workspace = scratch(words * workers);
  float* const work = floats_of(workspace);
  for_each_task(workers, parts, [&](int64_t worker, int64_t t) {
    const int64_t from = (first + t) * kPackedStep;
    kernels.packed_write(bank, std::max(begin, from), std::min(end, from + kPackedStep), work + worker * words);
  });
}

// A packed copy of storage, empty where there is nothing to pack.
Tensor bank_panels(const Tensor& storage) {
  PackedBank bank = packed_bank(storage, version_of(storage), nullptr);
  const int64_t words = bank.version < 0 ? 0 : kdfast::cpu_kernels().packed_words(bank);
  const Tensor panels = output(storage, {words}, ScalarType::Int);
  if (words == 0) return panels;
  bank.words = words_of(bank, panels);
  std::fill(bank.words, bank.words + words, 0);
  write_packed(bank, 0, bank.rows);
  kdfast::cpu_kernels().packed_stamp(bank);
  return panels;
}

bool bank_in_step(const Tensor& storage, const Tensor& panels) {
  PackedBank bank = packed_bank(storage, version_of(storage), nullptr);
  bank.words = words_of(bank, panels);
  return bank.words != nullptr && bank.version >= 0 && kdfast::cpu_kernels().packed_in_step(bank);
}

// ---- both ----------------------------------------------------------------------------------------------------------

// The caller then counts one in-place write to storage, which the copy's stamp is ahead of until then.
void bank_push(const Tensor& storage, const Tensor& pointer, const Tensor& fill, const OptionalTensor& labels, const OptionalTensor& panels,
               const Tensor& keys, const OptionalTensor& key_labels, const OptionalTensor& where, bool normalize) {
  PackedBank bank = packed_bank(storage, panels.has_value() ? version_of(storage) : -1, nullptr);
  const int64_t capacity = bank.rows, width = bank.width, count = keys.size(0);
  STD_TORCH_CHECK(capacity > 0, "storage must have a row");
  check("keys", keys, keys.scalar_type(), {count, width});
  int64_t *const next = packed_output<int64_t>("pointer", pointer, {}), *const filled = packed_output<int64_t>("fill", fill, {});
  STD_TORCH_CHECK(keys.is_contiguous(), "keys must be contiguous");
  STD_TORCH_CHECK(labels.has_value() == key_labels.has_value(), "labels and key_labels come together");
  const int64_t* const from = key_labels.has_value() ? packed<int64_t>("key_labels", *key_labels, {count}) : nullptr;
  int64_t* const to = labels.has_value() ? packed_output<int64_t>("labels", *labels, {capacity}) : nullptr;
  if (panels.has_value() && bank.version >= 0) bank.words = words_of(bank, *panels);
  const bool copied = bank.words != nullptr && kdfast::cpu_kernels().packed_in_step(bank);

  STD_TORCH_CHECK(*next >= 0 && *next < capacity, "pointer must be in [0, ", capacity, "), got ", *next);
  int64_t came;
  const std::vector<int64_t> kept = rows_kept(admitted(where, count), count, capacity, &came);
  const int64_t rows = int64_t(kept.size()), first = (*next + came - rows) % capacity;
  with_type(storage, [&](auto stored) {
    with_type(keys, [&](auto key) {
      auto* const matrix = static_cast<decltype(stored)*>(storage.mutable_data_ptr());
      std::vector<decltype(key)> own_rows;
      const auto* const given_rows = apart(data<decltype(key)>(keys), count * width, matrix, capacity * width, own_rows);
      std::vector<float> row(static_cast<size_t>(width));
      for (int64_t i = 0; i < rows; ++i)
        write_row(matrix + (first + i) % capacity * width, given_rows + kept[size_t(i)] * width, width, normalize, row.data());
    });
  });
  if (to != nullptr) {
    std::vector<int64_t> own_labels;
    const int64_t* const given_labels = apart(from, count, to, capacity, own_labels);
    for (int64_t i = 0; i < rows; ++i) to[(first + i) % capacity] = given_labels[kept[size_t(i)]];
  }
  *next = (*next + came) % capacity;
  *filled = std::min(capacity, *filled + came);
  if (!copied) return;
  write_packed(bank, first, std::min(capacity, first + rows));
  write_packed(bank, 0, first + rows - capacity);
  ++bank.version;
  kdfast::cpu_kernels().packed_stamp(bank);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("bank_panels", TORCH_BOX(&bank_panels));
  m.impl("bank_in_step", TORCH_BOX(&bank_in_step));
  m.impl("bank_push", TORCH_BOX(&bank_push));
}
