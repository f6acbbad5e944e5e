// Scratch that is kept from call to call, on large pages. Fresh memory costs a page fault for every page that is
// written first - 16 MB in pages of 4 KB take as long as ten sweeps over them - and small pages hold up every read from memory by a tenth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast {

constexpr int64_t kKeptScratchBytes = 64 << 20;  // at most so many are kept, in all

// Memory for one call, its contents undefined, aligned to a large page. One buffer is kept: a call that finds it taken by another thread, or
// too small, or needs more than may be kept, has memory of its own. So has one that finds more than `most` bytes: what is held for long must not
// hold a buffer many times its size.
class KeptScratch {
 public:
  explicit KeptScratch(int64_t bytes, int64_t most = kKeptScratchBytes);
  ~KeptScratch();
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;

  void* data() const { return block_->data; }

  struct Block {
    void* data;
    int64_t bytes;
    void* mapping;  // data lies in
  };

 private:
  Block* block_;
};

// Whether memory is handed out full of NaN from now on, as PyTorch's fill_uninitialized_memory has it: for tests.
void poison_scratch(bool poison);

// Gives the buffer that is kept back to the system; returns its bytes, 0 where there is none.
int64_t release_scratch();

}  // namespace kdfast
