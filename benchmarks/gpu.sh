#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most LIMIT seconds (590): build, benchmarks, tests, doctor, memory checker, the most
# valuable first. A step ends at its share of the limit, whatever happens in it, and one that fails does not stop the others. Results go to
# OUT, or to a folder of benchmarks/results named after the day and the commit (COMMIT, where the tree is no checkout): summary.md, cuda.csv,
# cuda.json, cuda.md and log.txt, each whole at any time.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-590}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${OUT:-benchmarks/results/$(date +%F)-$COMMIT}
export COMMIT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
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

run() {  # NAME PERCENT COMMAND...: until that share of the limit, then it gets `signal`, and `grace` seconds to end
  local name=$1 left=$((limit * $2 / 100 - SECONDS)) start=$SECONDS status
  shift 2
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

step() {  # NAME PERCENT COMMAND...
  run "$@"
  conclude "$1" $?
}

families=(similarity sinkhorn triplet knn gather methods)
# what Triton and Inductor compile needs nothing of the modules that are being built
run build 28 "$python" setup.py -q build_ext --inplace &
build=$!
run compile 28 env KDFAST_NO_EXT=1 nice "$python" -m kdfast bench "${families[@]}" --device cuda --compile-only --seconds $((limit * 27 / 100)) &
compile=$!
wait $build
conclude build $?
wait $compile
conclude compile $?

until=$((limit * 66 / 100))
step bench 68 "$python" -m kdfast bench "${families[@]}" --device cuda --seconds $((until > SECONDS ? until - SECONDS : 1)) --output "$out"
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n "$(nproc)")  # most of their time goes to compiling
# each test is named as it ends, for one that does not heed an interruption takes the summary with it
signal=INT grace=15 step tests 86 "$python" -m pytest -vv --tb=short -p no:cacheprovider "${parallel[@]}" tests/test_triton_gpu.py tests/test_cuda{,_similarity}_gpu.py \
  tests/test_triton_{similarity,pairs,wide,triplet,triplet_dense,triplet_mining,relations,knn,gather,sinkhorn,sinkhorn_plan,sinkhorn_adjoint}.py tests/test_cuda_{similarity,sinkhorn*}.py
step doctor 92 "$python" -m kdfast doctor
if command -v compute-sanitizer >/dev/null; then
  step memcheck 99 compute-sanitizer --error-exitcode 1 "$python" -m kdfast doctor
fi
tail -n 60 "$out/summary.md"
exit $failed
