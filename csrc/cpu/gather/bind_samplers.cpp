// kdfast::draw_alias and draw_class on the CPU: the draws of kdfast/bank/samplers.py, to the bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind.h"
#include "engine/random.h"

namespace {

constexpr int kUniform = 23;  // bits of a random number that become a uniform one; the others choose a column

// The rows drawn for each sample [N, K], its own before them with `positive`: [N, 1 + K]. f(bits, own, to) draws the K of a sample.
template <class F>
Tensor draw(const Tensor& own, const Tensor& seed, int64_t size, int64_t k, bool positive, const F& f) {
  const int64_t rows = own.size(0), width = k + (positive ? 1 : 0);
  const int64_t *const row = packed<int64_t>("own", own, {rows}), key = *packed<int64_t>("seed", seed, {});
  STD_TORCH_CHECK(k > 0, "k must be > 0, got ", k);
  STD_TORCH_CHECK(std::all_of(row, row + rows, [&](int64_t r) { return r >= 0 && r < size; }), "own must be in [0, ", size, ")");
  const Tensor index = output(own, {rows, width}, ScalarType::Long);
  int64_t* const to = static_cast<int64_t*>(index.mutable_data_ptr());
  const int64_t workers = workers_for(double(rows) * double(k) * 16, std::max<int64_t>(1, rows));  // a draw takes as long as 16 multiply-adds or so
  for_each_task(workers, rows, [&](int64_t, int64_t n) {
    int64_t* const at = to + n * width;
    if (positive) at[0] = row[n];
    f(RowBits(key, row[n]), row[n], at + (positive ? 1 : 0));
  });
  return index;
}

Tensor draw_alias(const Tensor& own, const Tensor& seed, const Tensor& keep, const Tensor& alias, const Tensor& heavy, const Tensor& heaviest,
                  int64_t tries, int64_t k, bool positive) {
  const int64_t tables = heavy.numel() + 1, size = alias.size(1);
  const float* const kept = packed<float>("keep", keep, {tables, size});
  const int64_t* const other = packed<int64_t>("alias", alias, {tables, size});
  const int64_t* const alone = packed<int64_t>("heavy", heavy, {tables - 1});
  const int64_t* const top = packed<int64_t>("heaviest", heaviest, {2});
  return draw(own, seed, size, k, positive, [&](const RowBits& bits, int64_t row, int64_t* to) {
    const int64_t table = (std::find(alone, alone + tables - 1, row) - alone + 1) % tables;  // 0: not a heavy row
    const auto attempt = [&](int64_t slot) {
      const uint64_t number = bits.at(slot) >> 1 & ((uint64_t(1) << 62) - 1);
      const int64_t column = int64_t((number >> kUniform) % uint64_t(size)), cell = table * size + column;
      const float uniform = (float(number & ((1u << kUniform) - 1)) + 0.5f) * 0x1p-23f;
      return uniform < kept[cell] ? column : other[cell];
    };
    for (int64_t slot = 0; slot < k; ++slot) {
      int64_t drawn = attempt(slot);
      for (int64_t t = 1; t < tries && drawn == row; ++t) drawn = attempt(t * k + slot);
      to[slot] = drawn != row ? drawn : top[0] == row ? top[1] : top[0];
    }
  });
}

Tensor draw_class(const Tensor& own, const Tensor& seed, const Tensor& by_class, const Tensor& first, const Tensor& count, int64_t k, bool positive) {
  const int64_t size = by_class.numel();
  const int64_t* const sorted = packed<int64_t>("by_class", by_class, {size});
  const int64_t *const begin = packed<int64_t>("first", first, {size}), *const length = packed<int64_t>("count", count, {size});
  return draw(own, seed, size, k, positive, [&](const RowBits& bits, int64_t row, int64_t* to) {
    const int64_t from = begin[row], members = length[row];
    STD_TORCH_CHECK(members < size, "labels must hold at least two classes");
    for (int64_t slot = 0; slot < k; ++slot) {
      const int64_t place = int64_t((bits.at(slot) >> 1) % uint64_t(size - members));
      to[slot] = sorted[place >= from ? place + members : place];
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("draw_alias", TORCH_BOX(&draw_alias));
  m.impl("draw_class", TORCH_BOX(&draw_class));
}
