// Large pages under fresh tensors of many megabytes.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bind.h"

namespace {

// Asks for them: the first write to each small page takes as long as a thousand exponentials.
inline Tensor on_large_pages(Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()), bytes = uintptr_t(x.numel()) * x.element_size();
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return x;
}

}  // namespace
