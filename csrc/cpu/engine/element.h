// The matrices that kernels read: row-major, contiguous, of any of three element types.
#pragma once

#include <stdint.h>

namespace kdfast {

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16 };

// How products are formed, whatever the elements are: as in float, from the two leading bf16 parts of each factor, from bf16.
// A permission, not an order: an instruction set that gains nothing by it takes float. The other two are as in float for a few rows: on
// vectors, where tiles would need parts packed first; and, in passes over a bank, from its rows where they lie (engine/in_place.inl).
enum class Precision : int32_t { kFloat32, kBFloat16x3, kBFloat16, kFloat32Vectors, kFloat32Rows };

struct Matrix {
  const void* data;  // null: not given
  ElementType type;

  int64_t element_bytes() const { return type == ElementType::kFloat32 ? 4 : 2; }
  // The matrix that begins `elements` further on.
  Matrix from(int64_t elements) const { return {static_cast<const char*>(data) + elements * element_bytes(), type}; }
};

}  // namespace kdfast
