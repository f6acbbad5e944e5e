// Results of megabytes, on memory kept from call to call as scratch is. The heap gives such memory back to the system once it lies at the heap's
// end, and takes it anew for the next call, in small pages where the heap's other data is near: 4 MB were 1 to 5 ms of page faults a gradient.
#pragma once

#include <memory>

#include "kept_scratch.h"
#include "large_pages.h"

// From PyTorch 2.11 on; before, null. (Its headers leave out what the oldest version served does not have.)
#if defined(__linux__)
extern "C" __attribute__((weak, visibility("default"))) int32_t torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                                                               int64_t storage_offset, int32_t dtype, int32_t device_type,
                                                                               int32_t device_index, AtenTensorHandle* made, int32_t layout,
                                                                               const uint8_t* metadata, int64_t metadata_size,
                                                                               void (*deleter)(void* data, void* context), void* context);
#endif

namespace {

constexpr int64_t kKeptOutputBytes = 2 << 20;  // a large page

// A contiguous tensor of `shape`, its contents undefined.
inline Tensor kept_output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
#if defined(__linux__)
  std::vector<int64_t> strides(shape.size());
  int64_t count = 1;
  for (size_t d = shape.size(); d-- > 0; count *= shape[d]) strides[d] = count;
  const int64_t bytes = count * (type == ScalarType::Double ? 8 : 4);
  if (bytes >= kKeptOutputBytes && torch_from_blob != nullptr) {
    auto memory = std::make_unique<kdfast::KeptScratch>(bytes, 2 * bytes);
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle made;
    require_success("an allocation",
                    torch_from_blob(memory->data(), int64_t(shape.size()), shape.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, &made,
                                    aoti_torch_layout_strided(), nullptr, 0,
                                    [](void*, void* context) { delete static_cast<kdfast::KeptScratch*>(context); }, memory.get()));
    memory.release();
    return Tensor(made);
  }
#endif
  return on_large_pages(output(like, shape, type));
}

}  // namespace
