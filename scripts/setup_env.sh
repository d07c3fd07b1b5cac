#!/usr/bin/env bash
# Sets up what a make target needs: system packages, the virtual environment .venv, packages from PyPI.
#
#   scripts/setup_env.sh build|demo|test
#
# System packages are installed by apt if this user may (root, or sudo without a password); otherwise one line names
# the missing ones and the setup goes on with what PyPI offers in their place. A stamp in .venv, keyed by the contents
# of the requirement files, makes the second run return at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=${1:-build}
case "$profile" in
  build) files=(requirements/build.txt) ;;
  demo) files=(requirements/build.txt requirements/demo.txt) ;;
  test) files=(requirements/build.txt requirements/demo.txt requirements/test.txt) ;;
  *) echo "usage: scripts/setup_env.sh build|demo|test" >&2; exit 2 ;;
esac

say() { printf '== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "Python >= 3.10 is needed: install the system package python3."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old: Python >= 3.10 is needed (name another one by PYTHON=...)."

stamp=.venv/.topk-$profile.stamp
key=$(cat scripts/setup_env.sh "${files[@]}" requirements/noroot.txt | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then exit 0; fi

# --- system packages ---------------------------------------------------------------------------------------------------
has_header() { echo "#include <$1>" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; }

missing_packages() {
  command -v "${CXX:-c++}" >/dev/null || echo g++
  "$python" -c 'import ensurepip, venv' 2>/dev/null || [ -x .venv/bin/pip ] || echo python3-venv
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || echo python3-dev
  has_header yaml-cpp/yaml.h || echo libyaml-cpp-dev
  has_header nlohmann/json.hpp || echo nlohmann-json3-dev
  command -v ccache >/dev/null || echo ccache
  if [ "$profile" = test ]; then
    has_header catch2/catch.hpp || has_header catch2/catch_all.hpp || echo catch2
  fi
}

as_root=none
if [ "$(id -u)" = 0 ]; then as_root=""; elif sudo -n true 2>/dev/null; then as_root=sudo; fi
mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -gt 0 ] && [ "$as_root" != none ] && command -v apt-get >/dev/null; then
  say "installing system packages: ${missing[*]}"
  $as_root apt-get update -qq || say "apt-get update failed; going on with the package lists at hand"
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    say "apt-get install failed"
  mapfile -t missing < <(missing_packages)
fi
fallbacks=()
if [ "${#missing[@]}" -gt 0 ]; then
  say "missing system packages: sudo apt-get install ${missing[*]}"
  for package in "${missing[@]}"; do
    case "$package" in
      g++ | python3-venv | python3-dev | catch2) fail "$package has no replacement; install it and repeat." ;;
      libyaml-cpp-dev | nlohmann-json3-dev) fallbacks=(-r requirements/noroot.txt) ;;
    esac
  done
  say "going on without them"
fi

# --- the virtual environment ---------------------------------------------------------------------------------------------
if [ ! -x .venv/bin/python ]; then
  say "creating .venv ($("$python" --version))"
  "$python" -m venv .venv
fi
say "installing Python packages for '$profile' (torch alone is about 2.5 GB the first time)"
quiet=(-q)
if [ -t 1 ]; then quiet=(); fi  # progress bars for those who watch
requirements=()
for file in "${files[@]}"; do requirements+=(-r "$file"); done
.venv/bin/python -m pip install --disable-pip-version-check "${quiet[@]}" "${requirements[@]}" "${fallbacks[@]}"
echo "$key" >"$stamp"
say "environment ready"
