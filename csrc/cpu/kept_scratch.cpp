#include "kept_scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

namespace kdfast {
namespace {

constexpr size_t kLargePage = 2 << 20;

std::atomic<KeptScratch::Block*> kept{nullptr};
std::atomic<bool> poisoned{false};

// A mapping of its own: the heap would hand out pages that are there already, and small.
#if defined(__linux__)
KeptScratch::Block* allocate(int64_t bytes) {
  const size_t size = (size_t(bytes) + kLargePage - 1) / kLargePage * kLargePage + kLargePage;
  void* const mapping = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapping), aligned = (begin + kLargePage - 1) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(aligned), size - kLargePage, MADV_HUGEPAGE);  // a hint: it may fail
  return new KeptScratch::Block{reinterpret_cast<void*>(aligned), int64_t(size - kLargePage), mapping};
}

void release(KeptScratch::Block* block) {
  if (block == nullptr) return;
  munmap(block->mapping, size_t(block->bytes) + kLargePage);
  delete block;
}
#else
KeptScratch::Block* allocate(int64_t bytes) {
  void* const data = ::operator new(size_t(bytes), std::align_val_t{kLargePage});
  return new KeptScratch::Block{data, bytes, data};
}

void release(KeptScratch::Block* block) {
  if (block == nullptr) return;
  ::operator delete(block->data, std::align_val_t{kLargePage});
  delete block;
}
#endif

}  // namespace

KeptScratch::KeptScratch(int64_t bytes, int64_t most) : block_(kept.exchange(nullptr)) {
  if (block_ != nullptr && block_->bytes > most) {
    release(kept.exchange(block_));  // back, in place of one that another thread has left meanwhile
    block_ = nullptr;
  }
  if (block_ == nullptr || block_->bytes < bytes) {
    release(block_);
    block_ = allocate(bytes);
  }
  if (poisoned) std::memset(block_->data, 0xff, size_t(bytes));
}

KeptScratch::~KeptScratch() {
  if (block_->bytes <= kKeptScratchBytes) {
    const int64_t bytes = block_->bytes;
    block_ = kept.exchange(block_);                                                   // another thread's, left meanwhile:
    if (block_ != nullptr && block_->bytes > bytes) block_ = kept.exchange(block_);  // the larger one stays
  }
  release(block_);
}

void poison_scratch(bool poison) { poisoned = poison; }

int64_t release_scratch() {
  KeptScratch::Block* const block = kept.exchange(nullptr);
  const int64_t bytes = block == nullptr ? 0 : block->bytes;
  release(block);
  return bytes;
}

}  // namespace kdfast
