#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most LIMIT seconds (590), the most valuable first: gpu.sh [PART...], the parts being
# build, check (the compiled kernels one by one, before anything is timed: its log names the test that fails, ends its process or hangs), bench,
# tests (the other kernels), doctor, memcheck, and racecheck, which takes part only where it is named. A part ends at its share of the limit,
# whatever happens in it, and one that fails does not stop the others; named alone it has all of the limit, and what was built before stays.
# FAMILIES are those that bench measures. Results go to OUT, or to a folder of benchmarks/results named after the day and the commit (COMMIT,
# where the tree is no checkout): summary.md, cuda.csv, cuda.json, cuda.md and log.txt, each whole at any time; to OUT also the modules that
# were built.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-590}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${OUT:-benchmarks/results/$(date +%F)-$COMMIT}
read -ra families <<<"${FAMILIES:-similarity sinkhorn triplet knn gather methods}"
declare -A share=([build]=28 [check]=9 [bench]=38 [tests]=13 [doctor]=4 [memcheck]=7 [racecheck]=7)
parts=("$@")
((${#parts[@]})) || parts=(build check bench tests doctor memcheck)
all=1  # the hundredth left is the report's
for part in "${parts[@]}"; do
  [[ -v share[$part] ]] || { echo "no part is called $part: there are ${!share[*]}" >&2; exit 2; }
  all=$((all + share[$part]))
done
export COMMIT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0
told=()

# asked once: to import torch takes seconds
if ! gpu=$("$python" -c "import sys, torch; torch.cuda.is_available() or sys.exit(1); print(torch.cuda.get_device_name())"); then
  echo "no GPU is visible to PyTorch ($python): nothing can be measured" >&2
  exit 1
fi
mkdir -p "$out"
if compgen -G ".peers/*.whl" >/dev/null; then  # as benchmarks/peers.sh leaves them
  if "$python" -m pip install -q --no-index --no-deps --no-compile --target "$logs/site" .peers/*.whl; then
    export PYTHONPATH="$PYTHONPATH:$logs/site"
  else
    told+=("the peers' wheels could not be installed")
  fi
fi

command -v nvidia-smi >/dev/null && nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE,ECC >"$logs/machine.log" 2>&1

write() {  # FILE: standard input, under a temporary name first
  cat >"$out/.$1.tmp" && mv "$out/.$1.tmp" "$out/$1"
}

report() {
  {
    echo "# $gpu, $COMMIT, $(date -u +'%F %H:%M UTC')"
    echo
    printf -- '- %s\n' "${told[@]}"
    echo
    [ ! -f "$out/cuda.md" ] || cat "$out/cuda.md"
  } | write summary.md
  for log in "$logs"/*.log; do printf '== %s\n' "$(basename "$log" .log)" && cat "$log"; done | write log.txt
}

run() {  # NAME COMMAND...: until second `until`, then it gets `signal`, and `grace` seconds to end
  local name=$1 left=$((until - SECONDS)) start=$SECONDS status
  shift
  ((left > 0)) || left=1
  timeout -s "${signal:-TERM}" -k "${grace:-3}" "$left" "$@" >"$logs/$name.log" 2>&1
  status=$?
  case $status in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "$name: ended by its limit after $((SECONDS - start)) s" ;;
    *) echo "$name: failed ($status) after $((SECONDS - start)) s" ;;
  esac >"$logs/$name.told"
  return $status
}

conclude() {  # NAME STATUS
  [ "$2" = 0 ] || failed=1
  told+=("$(cat "$logs/$1.told")")
  echo "== ${told[-1]}"
  tail -n "${3:-12}" "$logs/$1.log"
  report
}

step() {  # NAME COMMAND...
  run "$@"
  conclude "$1" $?
}

at_most() {  # SECONDS less than are left, at least 1
  echo $((until - SECONDS > $1 ? until - SECONDS - $1 : 1))
}

build() {  # beside it what needs nothing of the modules: what Triton and Inductor compile, and a first check of Triton's kernels
  run build "$python" setup.py -q build_ext --inplace &
  local built=$!
  run compile env KDFAST_NO_EXT=1 nice "$python" -m kdfast bench "${families[@]}" --device cuda --compile-only --seconds "$(at_most 6)" &
  local compiled=$!
  run triton env KDFAST_NO_EXT=1 nice "$python" -m kdfast doctor &
  local checked=$!
  wait $built
  local status=$?
  conclude build $status
  [[ $status != 0 || -z ${OUT:-} ]] || cp kdfast/_C*.so "$out"
  wait $compiled
  conclude compile $?
  wait $checked
  conclude triton $?
}

bench() {
  step bench "$python" -m kdfast bench "${families[@]}" --device cuda --seconds "$(at_most 12)" --output "$out"
}

plugin() {  # MODULE OPTION...: those options of pytest, where its plugin is here
  "$python" -c "import $1" 2>/dev/null && printf '%s\n' "${@:2}"
}

pytests() {  # NAME SECONDS TEST...: one that takes longer, or ends its process, is named, and another process goes on with the next
  local options=()
  mapfile -t options < <(plugin xdist -n "$(nproc)" && plugin pytest_timeout "--timeout=$2" --timeout-method=thread)
  # each test is named as it ends, for one that does not heed an interruption takes the summary with it
  OMP_NUM_THREADS=1 signal=INT grace=15 step "$1" "$python" -m pytest -vv --tb=short -p no:cacheprovider "${options[@]}" "${@:3}"
}

check() {  # small sizes before large ones
  pytests check 30 tests/test_cuda_{similarity,sinkhorn*}.py tests/test_cuda{,_similarity}_gpu.py
}

tests() {  # most of their time goes to compiling
  pytests tests 120 tests/test_triton_gpu.py \
    tests/test_triton_{similarity,pairs,attraction,wide,second,distillation,triplet,triplet_dense,triplet_mining,relations,knn,gather,sinkhorn,sinkhorn_plan,sinkhorn_adjoint}.py
}

doctor() {
  step doctor "$python" -m kdfast doctor
}

# Of the compiled kernels. Without PyTorch's pool every tensor is memory of its own, which nothing beyond its end belongs to.
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
sanitize() {  # TOOL
  command -v compute-sanitizer >/dev/null || return
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -vv --tb=short -p no:cacheprovider \
    tests/test_cuda_{similarity,sinkhorn}.py
}

shared=0
for part in "${parts[@]}"; do
  shared=$((shared + share[$part])) until=$((limit * shared / all))
  $part
done
tail -n 60 "$out/summary.md"
exit $failed
