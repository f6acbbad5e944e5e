// kdfast._C_cuda: importing it registers the CUDA kernels of the ops whose schemas kdfast._C has; the module itself tells what was built
// and what a device can do.

#include <pybind11/pybind11.h>

#include "sinkhorn/sinkhorn.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "kdfast's compiled CUDA kernels. The ops are torch.ops.kdfast.";
  m.def("build_info", [] { return pybind11::dict(pybind11::arg("flags") = KDFAST_FLAGS); }, "{'flags'}, as nvcc was given them");
  m.def("sinkhorn_streams", kdfast::sinkhorn_streams, "Whether the current device solves Sinkhorn problems that do not fit on chip.");
}
