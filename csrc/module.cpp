// kdfast._C: importing it registers the ops; the module itself only tells what was built and what is in force.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kept_scratch.h"

namespace py = pybind11;

namespace {

double thread_cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Processor time, not wall time: other work on the machine then costs no rate.
double one_thread_rate(const kdfast::CpuKernels& kernels, bool bfloat16, double seconds) {
  constexpr int64_t kSteps = 20000;  // well under a millisecond
  kernels.fma_probe(bfloat16, kSteps);
  const double begin = thread_cpu_seconds();
  double operations = 0, elapsed = 0;
  do {
    operations += kernels.fma_probe(bfloat16, kSteps);
    elapsed = thread_cpu_seconds() - begin;
  } while (elapsed < seconds);
  return operations / elapsed * 1e-9;
}

double fma_rate(const std::string& dtype, double seconds, int threads) {
  if (dtype != "fp32" && dtype != "bf16") throw py::value_error("dtype must be 'fp32' or 'bf16', got '" + dtype + "'");
  if (!(seconds > 0)) throw py::value_error("seconds must be > 0");
  if (threads < 1) throw py::value_error("threads must be >= 1, got " + std::to_string(threads));
  const py::gil_scoped_release release;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  if (threads == 1) return one_thread_rate(kernels, dtype == "bf16", seconds);  // on the caller's core
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (double& rate : rates) pool.emplace_back([&] { rate = one_thread_rate(kernels, dtype == "bf16", seconds); });
  for (std::thread& thread : pool) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = KDFAST_FLAGS;
  info["cxx"] = int64_t(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's compiled CPU kernels: what was built, and the instruction set in force. The ops are torch.ops.kdfast.";
  if (const char* name = std::getenv("KDFAST_CPU_ISA"); name != nullptr && *name != '\0') {
    try {
      kdfast::force_isa(name);
    } catch (const std::runtime_error& error) {
      throw py::import_error(std::string("KDFAST_CPU_ISA: ") + error.what());
    }
  }
  m.def("isas_in_binary", &kdfast::isas_in_binary, "Instruction sets compiled in, best first.");
  m.def("isas_available", &kdfast::isas_available, "Those of them this machine can run, best first.");
  m.def("isa_found", &kdfast::isa_found, "The best instruction set this machine can run.");
  m.def("isa_in_force", [] { return std::string(kdfast::cpu_kernels().isa); }, "The instruction set the kernels use now.");
  m.def(
      "force_isa", [](const std::optional<std::string>& name) { kdfast::force_isa(name ? name->c_str() : nullptr); }, py::arg("name"),
      "Use this instruction set from now on; None: the best. RuntimeError if it is unknown or not on this machine.");
  m.def("few_pairs", &kdfast::few_pairs, py::arg("rows"), py::arg("columns"), py::arg("width"),
        "Whether so few scores are kept from a loss to its gradient.");
  m.def("few_distilled_pairs", &kdfast::few_distilled_pairs, py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("teacher_width"),
        "The same of the scores of a student and a teacher.");
  m.def("build_info", &build_info, "{'compiler', 'flags', 'cxx'}");
  m.def("release_scratch", &kdfast::release_scratch,
        "Gives the scratch that calls keep for the next one (at most 64 MiB) back to the system; returns its bytes.");
  m.def("poison_scratch", &kdfast::poison_scratch, py::arg("poison"),
        "Whether that scratch is handed out full of NaN from now on, which shows what is read before it is written: for tests.");
  m.def("fma_rate", &fma_rate, py::arg("dtype") = "fp32", py::arg("seconds") = 0.2, py::arg("threads") = 1,
        "Measured multiply-add rate in GFLOP/s of processor time, of the instruction set in force, summed over threads.\n"
        "dtype 'fp32' or 'bf16' (dot products of pairs; the fp32 rate where the instruction set has none).");
}
