#!/usr/bin/env bash
# Lint, types and all tests; installs everything first where that is still to be done.
#   ./scripts/test.sh                         everything
#   ./scripts/test.sh tests/test_buckets.py   pytest's arguments; lint and types still come first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh dev
./scripts/check.sh
exec .venv/bin/python -m pytest "$@"
