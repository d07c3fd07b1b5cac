#!/usr/bin/env bash
# Packs a CUDA build for a machine that has a GPU and torch but cannot build: no toolkit, another Python version.
#
#   scripts/carry.sh [--trainer] [BUILD [FOLDER]]      defaults: build/cuda carry/gpu
#
# FOLDER then holds what scripts/gpu_check.sh runs there beside a copy of the sources:
#   lib/libtopk_attn.so   the operators, without debug information      python/   the Python package, which loads them
#   checks/               the check programs of tests/cuda              site/     pytest
#   csrc_hash             of the sources that were built
# --trainer adds topk-sft, topk-generate and topk-parity (python/topk_attn/bin). Such a build is configured with
# -DTOPK_STATIC_YAML_CPP=ON; there it runs with LD_LIBRARY_PATH=FOLDER/lib and TOPK_LIB=FOLDER/lib/libtopk_attn.so.
# At most 60 MiB are meant to travel at once. A larger folder can go in two runs: leave out checks/ in one and
# lib/ in the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

trainer=
if [ "${1:-}" = --trainer ]; then
  trainer=yes
  shift
fi
build=${1:-build/cuda}
folder=${2:-carry/gpu}
limit=$((60 << 20))
library=$(find "$build" -name libtopk_attn.so -path '*csrc/ops*' | head -1)
if [ -z "$library" ]; then
  echo "carry: no libtopk_attn.so in $build: build it first (cmake --preset cuda, see docs/install.md)" >&2
  exit 1
fi
newer=$(find csrc -type f -newer "$library" | head -1)
if [ -n "$newer" ]; then
  echo "carry: warning: $newer is newer than $library" >&2
fi
python=.venv/bin/python
[ -x "$python" ] || python=python3

rm -rf "$folder/lib" "$folder/checks" "$folder/python"
mkdir -p "$folder/lib" "$folder/checks" "$folder/python"
strip --strip-debug -o "$folder/lib/libtopk_attn.so" "$library"
for program in "$build"/tests/cuda/*_check; do
  [ -x "$program" ] && strip --strip-debug -o "$folder/checks/$(basename "$program")" "$program"
done
rmdir "$folder/checks" 2>/dev/null || true

# The package's Python files, and in place of the compiled module one that loads $TOPK_LIB.
(cd python && find topk_attn -name '*.py' -not -name _build_info.py -print0 | tar --null -T - -cf -) |
  tar -xf - -C "$folder/python"
cp scripts/carried_module.py "$folder/python/topk_attn/_C.py"
cp "$build/_build_info.py" "$folder/python/topk_attn/_build_info.py"

if [ -n "$trainer" ]; then
  cmake --install "$build" --component topk_trainer --prefix "$folder/python" --strip >/dev/null
  for program in "$folder"/python/topk_attn/bin/topk-*; do
    if readelf -d "$program" | grep -q 'NEEDED.*yaml-cpp'; then
      echo "carry: $(basename "$program") needs libyaml-cpp.so: configure $build with -DTOPK_STATIC_YAML_CPP=ON" >&2
      exit 1
    fi
  done
fi

# Pure Python wheels serve any version. numpy comes with torch there.
if [ ! -d "$folder/site/pytest" ]; then
  "$python" -m pip install --disable-pip-version-check -q --no-compile --target "$folder/site" pytest
fi
scripts/csrc_hash.sh >"$folder/csrc_hash"

du -sh "$folder"/* | sort -k2
size=$(du -sb "$folder" | cut -f1)
printf '%s: %d.%d MiB of sources %s\n' "$folder" $((size >> 20)) $(((size & 0xfffff) * 10 >> 20)) "$(cat "$folder/csrc_hash")"
if [ "$size" -gt "$limit" ]; then
  echo "carry: that is more than $((limit >> 20)) MiB: carry lib/ and checks/ in two runs" >&2
  exit 1
fi
