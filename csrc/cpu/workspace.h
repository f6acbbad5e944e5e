// Working memory of one call: a tensor, or kept from call to call, on large pages, where it is large.
#pragma once

#include <optional>

#include "bind.h"
#include "kept_scratch.h"

namespace {

template <class Real>
class Workspace {
 public:
  // Aligned to vectors, its contents undefined; kept from so many bytes on.
  explicit Workspace(int64_t count, int64_t kept_from = 4 << 20) {
    if (count * int64_t(sizeof(Real)) >= kept_from) {
      kept_.emplace(count * int64_t(sizeof(Real)));
      data_ = static_cast<Real*>(kept_->data());
    } else {
      fresh_ = scratch(count + 16, scalar_type<Real>());
      data_ = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(fresh_->mutable_data_ptr()) + 63) / 64 * 64);
    }
  }
  Real* data() const { return data_; }

 private:
  std::optional<kdfast::KeptScratch> kept_;
  std::optional<Tensor> fresh_;
  Real* data_;
};

// Of products, which read it at every step: pages of 4 KB make them 1 % slower from 1 MB on, 7 % at 10 MB. Smaller ones are spared the heap,
// which takes 5 us to hand out and take back 500 KB.
inline Workspace<float> product_workspace(int64_t count) { return Workspace<float>(count, 1 << 16); }

}  // namespace
