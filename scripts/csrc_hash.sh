#!/usr/bin/env bash
# Prints 16 hex digits that name the contents of csrc/: written into results, so that they say what was measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
find csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16
