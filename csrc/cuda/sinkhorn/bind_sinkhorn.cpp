// kdfast::sinkhorn_solve, sinkhorn_assign and sinkhorn_normalize on CUDA: checks and registration.

#include <string>
#include <tuple>

#include "bind.h"
#include "sinkhorn/sinkhorn.h"

namespace {

using kdfast::SinkhornAssign;
using kdfast::SinkhornBatch;
using kdfast::SinkhornNormalize;
using kdfast::SinkhornOnChip;
using kdfast::SinkhornRows;
using kdfast::SinkhornSchedule;
using kdfast::SinkhornStreamed;
using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SinkhornRows rows_of(const char* name, const Tensor& x, int64_t batch_stride) {
  const int64_t d = x.dim() - 2;
  STD_TORCH_CHECK(x.size(d) < INT32_MAX, "at most 2^31 - 2 rows, got ", x.size(d));
  SinkhornRows rows{x.size(d), x.size(d + 1), x.const_data_ptr(), element_of(name, x), false, batch_stride, x.stride(d), 1, 1, 1};
  rows.aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.row_stride % 4 == 0 && batch_stride % 4 == 0;
  return rows;
}

SinkhornBatch batch_of(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon, const OptionalTensor& rows, const OptionalTensor& columns,
                       std::optional<double> rho_a, std::optional<double> rho_b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must have 2 dimensions, got ", a.dim(), " and ", b.dim());
  SinkhornBatch p{};
  p.batch = a.size(0), p.n = a.size(1), p.m = b.size(1);
  p.a = packed<float>("a", a, {p.batch, p.n}), p.b = packed<float>("b", b, {p.batch, p.m}), p.epsilon = packed<float>("epsilon", epsilon, {p.batch});
  const bool shared = cost.dim() == 2;
  if (shared) {
    check("cost", cost, cost.scalar_type(), {p.n, p.m});
  } else {
    check("cost", cost, cost.scalar_type(), {p.batch, p.n, p.m});
  }
  const int64_t d = cost.dim() - 2;
  STD_TORCH_CHECK(p.m <= 1 || cost.stride(d + 1) == 1, "rows of the cost must be contiguous");
  p.cost = cost.const_data_ptr(), p.element = element_of("cost", cost);
  p.row_stride = cost.stride(d), p.batch_stride = shared ? 0 : cost.stride(0);
  STD_TORCH_CHECK(rows.has_value() == columns.has_value(), "rows and cols must be given together");
  if (rows.has_value()) {
    p.rows = packed<int64_t>("rows", *rows, {p.batch});
    p.columns = packed<int64_t>("cols", *columns, {p.batch});
  }
  p.rho_a = float(rho_a.value_or(0)), p.rho_b = float(rho_b.value_or(0));
  return p;
}

const char* streamed(const SinkhornOnChip& whole, const Tensor& cost, const Tensor& like, void* stream) {
  const SinkhornBatch& p = whole.problems;
  if (!kdfast::sinkhorn_streams()) return "problems that do not fit on chip need a GPU whose blocks may wait for one another";
  SinkhornStreamed s{p.batch, rows_of("cost", cost, p.batch_stride), p.a, p.b, p.epsilon, p.rows, p.columns, p.rho_a, p.rho_b,
                     whole.schedule, whole.start_g, whole.out, 1};
  if (!kdfast::sinkhorn_streamed_plan(s)) return "too many columns";
  const Tensor scratch = torch::stable::new_empty(like, {kdfast::sinkhorn_streamed_scratch(s)}, ScalarType::Float);
  return kdfast::sinkhorn_streamed(s, floats_of(scratch), stream);
}

Solution sinkhorn_solve(const OptionalTensor& cost, const OptionalTensor&, const OptionalTensor&, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                        const OptionalTensor& rows, const OptionalTensor& columns, std::string, std::optional<double> rho_a, std::optional<double> rho_b,
                        const Tensor& g0, int64_t iterations, std::optional<double> tol, std::string method, std::optional<double> anneal_start,
                        std::optional<double> anneal_factor, bool history) {
  STD_TORCH_CHECK(cost.has_value(), "sinkhorn_solve on CUDA takes a cost, not points");
  STD_TORCH_CHECK(1 <= iterations && iterations < INT32_MAX, "iterations must be in 1 ... 2^31 - 2, got ", iterations);
  STD_TORCH_CHECK(a.size(0) <= INT32_MAX / 8, "at most 2^28 - 1 problems, got ", a.size(0));
  const bool proximal = method == "proximal";
  STD_TORCH_CHECK(!(proximal && tol.has_value()), "method 'proximal' takes no tol on CUDA");
  SinkhornOnChip p{};
  p.problems = batch_of(*cost, a, b, epsilon, rows, columns, rho_a, rho_b);
  p.schedule = {int(iterations), float(tol.value_or(-1)), proximal, anneal_start.value_or(0), anneal_factor.value_or(1)};
  const auto [batch, n, m] = std::tuple(p.problems.batch, p.problems.n, p.problems.m);
  p.start_g = packed<float>("g", g0, {batch, m});
  const int64_t steps = history ? iterations : 0;
  const auto reals = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(a, shape); };
  Tensor f = reals({batch, n}), g = reals({batch, m}), row = reals({batch, n}), column = reals({batch, m});
  Tensor transport = reals({batch}), error = reals({batch}), done = torch::stable::new_empty(a, {batch}, ScalarType::Long);
  Tensor steps_f = reals({batch, steps, n}), steps_g = reals({batch, steps, m});
  p.out = {floats_of(f), floats_of(row), floats_of(g), floats_of(column), floats_of(transport), floats_of(error), static_cast<int64_t*>(done.mutable_data_ptr()),
           nullptr, nullptr};
  if (history) p.out.history_f = floats_of(steps_f), p.out.history_g = floats_of(steps_g);
  if (batch == 0) return {f, g, row, column, transport, error, done, steps_f, steps_g};
  on_device_of(a, [&](void* stream) {
    return kdfast::sinkhorn_fits_on_chip(n, m) ? kdfast::sinkhorn_on_chip(p, stream) : streamed(p, *cost, a, stream);
  });
  return {f, g, row, column, transport, error, done, steps_f, steps_g};
}

Tensor sinkhorn_assign(const Tensor& scores, const OptionalTensor& v, const Tensor& inverse_epsilon, bool codes) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must have 3 dimensions, got ", scores.dim());
  const int64_t batch = scores.size(0), n = scores.size(1), columns = scores.size(2);
  check("scores", scores, scores.scalar_type(), {batch, n, columns});
  STD_TORCH_CHECK(columns <= 1 || scores.stride(2) == 1, "rows of the scores must be contiguous");
  STD_TORCH_CHECK(v.has_value() || !codes, "codes need v");
  SinkhornAssign p{};
  p.batch = batch, p.scores = rows_of("scores", scores, scores.stride(0));
  p.inverse_epsilon = packed<float>("inverse_epsilon", inverse_epsilon, {});
  if (v.has_value()) p.v = packed<float>("v", *v, {batch, columns});
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.v) % 16 == 0, "v must begin at a multiple of 16 bytes");
  p.codes = codes;
  Tensor out = codes ? torch::stable::new_empty(scores, {batch, n, columns}, ScalarType::Float)
                     : torch::stable::new_empty(scores, {batch, columns}, ScalarType::Float);
  p.out = floats_of(out);
  if (out.numel() == 0) return out;
  on_device_of(scores, [&](void* stream) -> const char* {
    if (!kdfast::sinkhorn_assign_plan(p)) return "too many columns";
    Tensor parts = torch::stable::new_empty(scores, {codes ? 0 : v.has_value() ? 1 : 2, batch, p.scores.parts, columns}, ScalarType::Float);
    p.sums = floats_of(parts), p.tops = p.sums + batch * p.scores.parts * columns;
    return kdfast::sinkhorn_assign(p, stream);
  });
  return out;
}

Tensor sinkhorn_normalize(const Tensor& logits, const OptionalTensor& gradient, int64_t iterations, double eps) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must have 3 dimensions, got ", logits.dim());
  STD_TORCH_CHECK(1 <= iterations && iterations <= INT32_MAX / 2, "iterations must be in 1 ... 2^30 - 1, got ", iterations);
  const int64_t batch = logits.size(0), n = logits.size(1);
  STD_TORCH_CHECK(batch <= INT32_MAX, "at most 2^31 - 1 matrices, got ", batch);
  SinkhornNormalize p{int(batch), int(n), int(iterations), float(eps), packed<float>("logits", logits, {batch, n, n}), nullptr, nullptr};
  if (gradient.has_value()) p.gradient = packed<float>("gradient", *gradient, {batch, n, n});
  Tensor out = torch::stable::new_empty(logits, {batch, n, n});
  p.out = floats_of(out);
  if (out.numel() > 0) on_device_of(logits, [&](void* stream) { return kdfast::sinkhorn_normalize(p, stream); });
  return out;
}

}  // namespace

KDFAST_CUDA_OPS(m) {
  m.impl("sinkhorn_solve", TORCH_BOX(&sinkhorn_solve));
  m.impl("sinkhorn_assign", TORCH_BOX(&sinkhorn_assign));
  m.impl("sinkhorn_normalize", TORCH_BOX(&sinkhorn_normalize));
}
