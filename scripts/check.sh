#!/usr/bin/env bash
# Check format, lint and types, in seconds. `./scripts/check.sh --fix` formats and fixes what lint can fix.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh dev
if [[ "${1:-}" == --fix ]]; then
  .venv/bin/ruff check --quiet --fix .
  .venv/bin/ruff format --quiet .
fi
.venv/bin/ruff format --check --quiet . || { echo "check.sh: not formatted; run ./scripts/check.sh --fix" >&2; exit 1; }
.venv/bin/ruff check .
.venv/bin/mypy
