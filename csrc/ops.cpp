// Every op schema, once. Kernels register themselves beside their code; fake kernels are in kdfast/_ops/<family>/cpu.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kdfast, m) {
  m.def(
      "similarity_softmax(Tensor query, Tensor keys, Tensor scale, Tensor? bias, Tensor? start_logit, Tensor? values, Tensor? start_value, "
      "Tensor? query_labels, Tensor? key_labels, Tensor? key_index, Tensor? limit, Tensor? valid, bool pooled, int precision, "
      "Tensor? panels=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_grad_rows(Tensor slope, Tensor? h, Tensor lse, Tensor? lse_low, Tensor query, Tensor keys, Tensor scale, Tensor? bias, "
      "Tensor? values, Tensor? query_labels, Tensor? key_labels, Tensor? key_index, Tensor? limit, Tensor? valid, int precision) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_grad_keys(Tensor slope, Tensor? h, Tensor lse, Tensor? lse_low, Tensor query, Tensor keys, Tensor scale, Tensor? bias, "
      "Tensor? values, Tensor? query_labels, Tensor? key_labels, Tensor? key_index, Tensor? limit, Tensor? valid, bool want_keys, "
      "bool want_bias, bool want_values, int precision) -> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_pooled_grad(Tensor? g, Tensor h, Tensor pooled, Tensor lse, Tensor lse_low, Tensor query, Tensor keys, Tensor scale, "
      "Tensor? bias, Tensor? values, Tensor? start_weight, Tensor? start_slope, Tensor? query_labels, Tensor? key_labels, Tensor? key_index, "
      "Tensor? limit, Tensor? valid, bool want_rows, bool want_keys, bool want_bias, bool want_values, int precision) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pooled_softmax(Tensor query, Tensor keys, Tensor? values, float factor, bool keep, int precision, Tensor? scale=None, "
      "Tensor? bias=None, Tensor? query_labels=None, Tensor? key_labels=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pooled_softmax_grad(Tensor? g, Tensor? h, Tensor pooled, Tensor lse, Tensor lse_low, Tensor scores, Tensor query, Tensor keys, "
      "Tensor? values, float factor, bool want_query, bool want_keys, bool want_values, int precision, Tensor? scale=None, "
      "Tensor? bias=None, Tensor? query_labels=None, Tensor? key_labels=None, bool want_bias=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_second(Tensor g, Tensor? query_direction, Tensor? keys_direction, Tensor? scale_direction, Tensor lse, Tensor lse_low, "
      "Tensor pooled, Tensor query, Tensor keys, Tensor scale, Tensor? bias, Tensor? query_labels, Tensor? key_labels, Tensor? key_index, "
      "Tensor? limit, Tensor? valid, bool want_keys, int precision) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_pooled_second(Tensor g, Tensor h, Tensor? query_direction, Tensor? keys_direction, Tensor? scale_direction, "
      "Tensor? values_direction, Tensor lse, Tensor lse_low, Tensor query, Tensor keys, Tensor scale, Tensor? bias, Tensor? values, "
      "Tensor? query_labels, Tensor? key_labels, Tensor? key_index, Tensor? limit, Tensor? valid, bool want_h, bool want_keys, "
      "bool want_scale, bool want_values, int precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce(Tensor query, Tensor keys, Tensor? scale, Tensor? bias, Tensor? query_labels, Tensor? key_labels, Tensor? key_index, "
      "Tensor? limit, Tensor? valid, Tensor? positive, Tensor? columns, Tensor? weights, bool include_positive, bool mean, bool pull, "
      "int precision, Tensor? panels=None, bool keep_keys=False, float factor=1.0, float smoothing=0.0, "
      "bool attract=False, Tensor? row_weights=None, bool sum=False, bool want_scale=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_grad(Tensor g, Tensor statistics, Tensor pull, Tensor query, Tensor keys, Tensor? scale, Tensor? bias, "
      "Tensor? query_labels, Tensor? key_labels, Tensor? key_index, Tensor? limit, Tensor? valid, Tensor? columns, bool want_query, "
      "bool want_keys, bool want_scale, bool want_bias, bool want_positive, int precision, Tensor? kept_keys=None, float factor=1.0, "
      "bool spread=False, bool attract=False, bool include_positive=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_grad_rows(Tensor g, Tensor? statistics, Tensor pull, Tensor query, Tensor? scale, bool want_query, bool want_scale, "
      "bool want_positive, float factor=1.0, bool spread=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_second(Tensor g, Tensor? query_direction, Tensor? keys_direction, Tensor? scale_direction, Tensor? positive_direction, "
      "Tensor statistics, Tensor pull, Tensor query, Tensor keys, Tensor? scale, Tensor? bias, Tensor? query_labels, Tensor? key_labels, "
      "Tensor? key_index, Tensor? limit, Tensor? valid, Tensor? positive, Tensor? columns, bool include_positive, bool want_g, bool want_keys, "
      "bool want_scale, bool want_positive, int precision, float factor) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_distillation(Tensor student, Tensor keys, Tensor teacher, Tensor teacher_keys, Tensor? scale, Tensor? teacher_scale, "
      "Tensor? bias, Tensor? start_logit, Tensor? teacher_start_logit, Tensor? key_index, Tensor? valid, int precision, bool kl=False, "
      "bool mean=False, bool keep_keys=False, float factor=1.0, float teacher_factor=1.0, Tensor? row_weights=None, bool sum=False, "
      "bool want_teacher=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_distillation_grad_keys(Tensor g, Tensor log_sums, Tensor student, Tensor keys, Tensor teacher, Tensor teacher_keys, "
      "Tensor? scale, Tensor? teacher_scale, Tensor? bias, Tensor? key_index, Tensor? valid, int precision, float factor=1.0, "
      "float teacher_factor=1.0, Tensor? table=None) -> Tensor");
  m.def("symmetric_lse(Tensor x, Tensor y, Tensor scale, Tensor? x_labels, Tensor? y_labels, int precision) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "symmetric_gradients(Tensor row_g, Tensor column_g, Tensor row_lse, Tensor column_lse, Tensor row_low, Tensor column_low, Tensor x, "
      "Tensor y, Tensor scale, Tensor? x_labels, Tensor? y_labels, bool want_x, bool want_y, int precision) -> (Tensor, Tensor)");
  m.def("sigmoid_pairs(Tensor x, Tensor y, Tensor scale, Tensor shift, Tensor positive, int precision) -> Tensor");
  m.def(
      "sigmoid_gradients(Tensor g, Tensor x, Tensor y, Tensor scale, Tensor shift, Tensor positive, bool want_x, bool want_y, int precision) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "matching_loss(Tensor x, Tensor? y, Tensor? scale, Tensor? shift, Tensor? labels, bool mean, bool keep_x, bool keep_y, int precision, "
      "bool rows_alone=False, float smoothing=0.0, float factor=1.0, bool include=True, Tensor? row_weights=None, "
      "bool sum=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "matching_loss_grad(Tensor g, Tensor statistics, Tensor x, Tensor? y, Tensor? scale, Tensor? shift, Tensor? labels, "
      "bool want_x, bool want_y, bool want_scale, bool want_shift, int precision, bool rows_alone=False, "
      "float smoothing=0.0, float factor=1.0, Tensor? kept_x=None, Tensor? table=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("unit_length(Tensor x) -> (Tensor, Tensor)");
  m.def("unit_length_grad(Tensor dy, Tensor x, Tensor norm) -> Tensor");
  m.def("sup_con(Tensor x, Tensor scale, Tensor labels, bool mean, int precision) -> (Tensor, Tensor)");
  m.def("sup_con_grad(Tensor g, Tensor statistics, Tensor x, Tensor scale, Tensor labels, bool want_x, bool want_scale, int precision) -> (Tensor, Tensor)");
  m.def("bank_panels(Tensor storage) -> Tensor");
  m.def("bank_in_step(Tensor storage, Tensor panels) -> bool");
  m.def(
      "bank_push(Tensor(a!) storage, Tensor(b!) pointer, Tensor(c!) fill, Tensor(d!)? labels, Tensor(e!)? panels, Tensor keys, "
      "Tensor? key_labels, Tensor? where, bool normalize) -> ()");
  m.def(
      "draw_alias(Tensor own, Tensor seed, Tensor keep, Tensor alias, Tensor heavy, Tensor heaviest, int tries, int k, bool positive) -> Tensor");
  m.def("draw_class(Tensor own, Tensor seed, Tensor by_class, Tensor first, Tensor count, int k, bool positive) -> Tensor");
  m.def("gather_similarity(Tensor query, Tensor bank, Tensor index) -> Tensor");
  m.def("gather_weighted_sum(Tensor weight, Tensor bank, Tensor index) -> Tensor");
  m.def("gather_statistic(Tensor query, Tensor bank, Tensor index, Tensor? offset, Tensor? shift, bool pooled) -> (Tensor, Tensor)");
  m.def("gather_scatter(Tensor weight, Tensor query, Tensor index, int size, ScalarType dtype) -> Tensor");
  m.def(
      "sinkhorn_solve(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor g, int iterations, float? tol, str method, float? anneal_start, float? anneal_factor, "
      "bool history) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_iterate(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor g, int iterations, str method, float? anneal_start, float? anneal_factor, "
      "bool history) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_marginals(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor f, Tensor g) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_plan(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor? f, Tensor? g, Tensor? weight, Tensor? slope, bool sum, "
      "int begin, int end) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_product(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor f, Tensor g, Tensor v, Tensor plus, Tensor factor) -> Tensor");
  m.def(
      "sinkhorn_replay(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor g, Tensor history_f, Tensor history_g, Tensor done, Tensor to_f, Tensor to_g, bool to_epsilon, "
      "int iterations, float? tol, str method, float? anneal_start, float? anneal_factor) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_pull(Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, str metric, "
      "float? rho_a, float? rho_b, Tensor f, Tensor g, Tensor weight, Tensor? slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sinkhorn_assign(Tensor scores, Tensor? v, Tensor inverse_epsilon, bool codes) -> Tensor");
  m.def("sinkhorn_codes(Tensor scores, Tensor inverse_epsilon, int iterations) -> Tensor");
  m.def("sinkhorn_normalize(Tensor logits, Tensor? gradient, int iterations, float eps) -> Tensor");
  m.def("gaussian_sums(Tensor x, Tensor y, float[] sigmas, bool same, bool gradient) -> (Tensor, Tensor)");
  m.def("rkd_distance(Tensor student, Tensor teacher, bool gradient) -> (Tensor, Tensor)");
  m.def("rkd_angle(Tensor student, Tensor teacher, bool gradient) -> (Tensor, Tensor)");
  m.def(
      "knn_scan(Tensor query, Tensor keys, Tensor factor, Tensor offset, Tensor? query_labels, Tensor? key_labels, bool only_same, Tensor? own, "
      "int first, int precision, "
      "int k, int kept, Tensor(a!) rank, Tensor(b!) index, Tensor(c!) count, Tensor(d!) room, Tensor(e!) threshold, int metric, Tensor base, "
      "float product_error, float float_error) -> ()");
  m.def(
      "knn_refine(Tensor query, Tensor bank, "
      "int k, int kept, Tensor(a!) rank, Tensor(b!) index, Tensor(c!) count, Tensor(d!) room, Tensor(e!) threshold, int metric, Tensor base, "
      "float product_error, float float_error) -> (Tensor, Tensor, Tensor)");
  m.def(
      "triplet_extrema(Tensor x, Tensor y, Tensor? centre, bool normalize, int metric, Tensor label, Tensor own, Tensor first, Tensor skip, "
      "Tensor count, Tensor sequence, Tensor ref_label, Tensor order, Tensor exists, int beyond, bool farthest_negative, int precision) "
      "-> (Tensor, Tensor)");
  m.def(
      "triplet_facenet(Tensor x, Tensor y, Tensor? centre, bool normalize, int metric, Tensor label, Tensor own, Tensor first, Tensor skip, "
      "Tensor count, Tensor sequence, Tensor ref_label, Tensor order, Tensor exists, int each, int precision) -> (Tensor, Tensor)");
  m.def(
      "triplet_weighted(Tensor x, Tensor y, Tensor? centre, bool normalize, int metric, Tensor label, Tensor own, Tensor first, Tensor skip, "
      "Tensor count, Tensor sequence, Tensor ref_label, Tensor order, Tensor exists, int each, Tensor seed, float least, float low, "
      "float high, bool fallback, int precision) -> (Tensor, Tensor)");
  m.def(
      "triplet_chosen(Tensor x, Tensor? y, Tensor positive, Tensor negative, bool normalize, int metric, float margin, float sign, bool soft, "
      "bool swap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "triplet_chosen_grad(Tensor g, Tensor factors, Tensor x_scale, Tensor y_scale, Tensor x, Tensor? y, Tensor positive, Tensor negative, "
      "bool normalize, int metric, bool want_x, bool want_y) -> (Tensor, Tensor)");
  m.def(
      "triplet_hinges(Tensor x, Tensor? y, Tensor first, Tensor last, Tensor own, Tensor columns, int metric, int positives, int mining, "
      "float sign, float margin, float epsilon, bool soft, bool want_x, bool want_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "triplet_hinges_grad(Tensor g, Tensor nearest, Tensor tiles, Tensor dx, Tensor dy, Tensor x, Tensor? y, Tensor first, Tensor last, "
      "Tensor own, Tensor columns, int metric, int positives, int mining, float sign, float margin, float epsilon, bool soft, bool want_x, "
      "bool want_y) -> (Tensor, Tensor)");
  m.def(
      "every_triplet(Tensor[] x, Tensor[] y, Tensor? mine, Tensor? mine_ref, Tensor first, Tensor last, Tensor own, Tensor columns, int metric, "
      "int positives, int mining, float sign, float margin, float epsilon, bool soft, bool swap, bool want_x, bool want_y) -> Tensor[]");
  m.def(
      "every_triplet_grad(Tensor g, Tensor nearest, Tensor[] dx, Tensor[] dy, Tensor[] x, Tensor[] y, Tensor? mine, Tensor? mine_ref, Tensor first, "
      "Tensor last, Tensor own, Tensor columns, int metric, int positives, int mining, float sign, float margin, float epsilon, bool soft, bool swap, "
      "bool want_x, bool want_y) -> Tensor[]");
  m.def(
      "pair_hinges(Tensor x, Tensor? y, Tensor first, Tensor last, Tensor own, Tensor columns, Tensor levels, int metric) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "pair_hinges_grad(Tensor g, Tensor tiles, Tensor x, Tensor? y, Tensor first, Tensor last, Tensor own, Tensor columns, Tensor levels, "
      "int metric, bool want_x, bool want_y) -> (Tensor, Tensor)");
  m.def(
      "multi_similarity(Tensor x, Tensor? y, Tensor first, Tensor last, Tensor own, Tensor columns, float alpha, float beta, float base, "
      "float epsilon) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "multi_similarity_grad(Tensor g, Tensor nearest, Tensor positive_log, Tensor negative_log, Tensor tiles, Tensor x, Tensor? y, "
      "Tensor first, Tensor last, Tensor own, Tensor columns, float alpha, float beta, float base, float epsilon, bool want_x, bool want_y) "
      "-> (Tensor, Tensor)");
}
