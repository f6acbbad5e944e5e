#!/usr/bin/env bash
# Everything that needs a GPU, in one command and about ten minutes: build, doctor, tests, memory checker, benchmarks.
# Results go to $OUT, or to a folder of benchmarks/results named after the day and the commit. A step that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${OUT:-benchmarks/results/$(date +%F)-$commit}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "failed: $name"; }
  tail -n 12 "$out/$name.log"
}

step build 300 "$python" setup.py -q build_ext --inplace
step doctor 60 "$python" -m kdfast doctor
step tests 180 "$python" -m pytest -q -p no:cacheprovider tests/test_triton_gpu.py tests/test_triton_similarity.py tests/test_triton_pairs.py \
  tests/test_triton_wide.py tests/test_triton_triplet.py tests/test_triton_triplet_dense.py tests/test_triton_triplet_mining.py \
  tests/test_triton_relations.py tests/test_triton_knn.py \
  tests/test_triton_gather.py tests/test_triton_sinkhorn.py
step tests-cuda 120 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_gpu.py tests/test_cuda_sinkhorn.py tests/test_cuda_sinkhorn_streamed.py \
  tests/test_cuda_sinkhorn_layers.py
if command -v compute-sanitizer >/dev/null; then
  step memcheck 60 compute-sanitizer --error-exitcode 1 "$python" benchmarks/gpu_similarity.py --shapes 65,300,24 --repeats 1 --peers none
  step memcheck-families 90 compute-sanitizer --error-exitcode 1 "$python" benchmarks/gpu_families.py --sizes small --repeats 1
fi
step similarity 240 "$python" benchmarks/gpu_similarity.py --output "$out" --commit "$commit"
step families 180 "$python" benchmarks/gpu_families.py --output "$out" --commit "$commit"
exit $failed
