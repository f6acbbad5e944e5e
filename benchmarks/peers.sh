#!/usr/bin/env bash
# Downloads the libraries of peers-gpu.txt as wheels into .peers (ignored by git), for a machine with a GPU that reaches no package index:
# gpu.sh takes them from there. PYTHON_VERSION is that machine's.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf .peers
platforms=()
for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${PYTHON:-python3}" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest .peers --requirement benchmarks/peers-gpu.txt
du -sh .peers
