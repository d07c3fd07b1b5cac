#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes (without the build): operator tests, benchmark, check programs of the kernels,
# compute-sanitizer. Prints a line a stage and writes benchmarks/results/last_gpu_run.json. A stage that
# fails does not stop the later ones; the exit status is 1 then.
#
#   scripts/gpu_check.sh [--result FILE] [--log FILE] [--seconds N] [tests] [benchmark] [checks] [sanitizer]
#
# What runs: a folder made by scripts/carry.sh, named by TOPK_CARRY (default carry/gpu, if it is there and holds these
# very sources); TOPK_LIB names another libtopk_attn.so, TOPK_CHECKS another folder of check programs. Else the preset
# `cuda` is built into build/cuda first, which needs nvcc. The carried way needs no virtual environment: PYTHON
# (default python3) with torch will do. TOPK_REAL (default real.safetensors in that folder): the benchmark's real data,
# written by benchmarks/gpu/capture_smollm2.py; without it those rows are not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

csrc_hash=$(scripts/csrc_hash.sh)
carry=$(realpath -m "${TOPK_CARRY:-carry/gpu}")
if [ -n "${TOPK_CARRY:-}${TOPK_LIB:-}" ] || [ "$(cat "$carry/csrc_hash" 2>/dev/null)" = "$csrc_hash" ]; then
  python=${PYTHON:-python3}
  export TOPK_LIB=${TOPK_LIB:-$carry/lib/libtopk_attn.so}
  export TOPK_CHECKS=${TOPK_CHECKS:-$carry/checks}
  export TOPK_REAL=${TOPK_REAL:-$carry/real.safetensors}
  export PYTHONPATH=$carry/python:$carry/site${PYTHONPATH:+:$PYTHONPATH}
  if [ ! -f "$TOPK_LIB" ]; then
    echo "gpu_check: $TOPK_LIB is not there: make it by scripts/carry.sh, or name another by TOPK_LIB" >&2
    exit 1
  fi
  built=$(cat "$carry/csrc_hash" 2>/dev/null || echo unknown)
  if [ "$built" != "$csrc_hash" ]; then
    echo "gpu_check: the carried build is of sources $built, these are $csrc_hash" >&2
  fi
else
  scripts/setup_env.sh test
  export PATH=$PWD/.venv/bin:$PATH
  python=$PWD/.venv/bin/python
  cmake --preset cuda -DPython_EXECUTABLE="$python" -DTOPK_BUILD_TESTS=ON
  cmake --build build/cuda --parallel "$(python3 cmake/backend/topk_build_env.py jobs)" --target all inplace
  export TOPK_CHECKS=$PWD/build/cuda/tests/cuda
  export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
  built=$csrc_hash
fi
exec "$python" scripts/gpu_stages.py --csrc-hash "$built" "$@"
