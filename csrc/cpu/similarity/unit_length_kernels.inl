// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/unit_length.inl"

namespace kdfast {
extern const UnitLengthKernels KDFAST_UNIT(unit_length);
const UnitLengthKernels KDFAST_UNIT(unit_length) = {
    .unit_length = unit_length,
    .unit_length_grad = unit_length_grad,
};
}  // namespace kdfast
