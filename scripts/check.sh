#!/usr/bin/env bash
# Format, lint and types; seconds. `./scripts/check.sh --fix` mends what can be mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh dev
if [[ "${1:-}" == --fix ]]; then
  .venv/bin/ruff check --quiet --fix .
  .venv/bin/ruff format --quiet .
fi
.venv/bin/ruff format --check --quiet . || { echo "check.sh: not formatted; ./scripts/check.sh --fix does it" >&2; exit 1; }
.venv/bin/ruff check .
.venv/bin/mypy
