#!/usr/bin/env bash
# Run lint, types and tests. Installs everything first if needed.
#   ./scripts/test.sh                         all tests, with line coverage; fails below the floor in pyproject.toml
#   ./scripts/test.sh --fast                  without the tests marked slow: a minute or two on two cores
#   ./scripts/test.sh tests/test_chunks.py    any arguments of pytest, without coverage
# All tests run in one process for each core: faster, and a single process would compile more programs than Linux has memory
# mappings for. Those marked alone measure time and run after the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/check.sh
if (($# == 0)); then
  .venv/bin/coverage erase
  .venv/bin/coverage run -m pytest -n logical --dist loadfile -m "not alone"
  .venv/bin/coverage run -m pytest -m alone $(grep -l "mark.alone" tests/test_*.py)
  .venv/bin/coverage combine --quiet
  exec .venv/bin/coverage report
fi
if [[ "$1" == --fast ]]; then
  shift
  set -- -m "not slow" --durations=5 --durations-min=1 "$@"
fi
exec .venv/bin/python -m pytest "$@"
