#!/usr/bin/env bash
# Create .venv and install the project into it, unless that was done for the same setup.py and pyproject.toml.
#   ./scripts/setup.sh        what running needs
#   ./scripts/setup.sh dev    also what the tests need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
[[ -z "$extra" || "$extra" == dev ]] || { echo "setup.sh: got '$extra', expected nothing or 'dev'" >&2; exit 2; }
target=".${extra:+[$extra]}"
log=.venv/setup.log
wanted="$(cat setup.py pyproject.toml | sha256sum | cut -d' ' -f1)"
stamp=".venv/.installed${extra:+-$extra}"

[[ -f "$stamp" && "$(<"$stamp")" == "$wanted" && -x .venv/bin/python ]] && exit 0

python=""
for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then python="$candidate"; break; fi
done
[[ -n "$python" ]] || { echo "setup.sh: needs Python 3.10 to 3.13 (torch_xla 2.9 has wheels for these); none was found on PATH" >&2; exit 2; }

# Run a command with its output in the log, and show that time passes.
quietly() {
  local title="$1" began=$SECONDS pid status=0
  shift
  "$@" >>"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null || true; echo >&2; exit 130' INT TERM
  if [[ -t 2 ]]; then
    while kill -0 "$pid" 2>/dev/null; do printf '\r%s ... %d s' "$title" $((SECONDS - began)) >&2; sleep 1; done
    wait "$pid" || status=$?
    printf '\r%s ... %d s\n' "$title" $((SECONDS - began)) >&2
  else
    echo "$title ..." >&2
    wait "$pid" || status=$?
  fi
  trap - INT TERM
  if ((status)); then
    echo "setup.sh: this failed; the end of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
  fi
}

if ! .venv/bin/python -c '' 2>/dev/null; then
  rm -rf .venv
  mkdir .venv
  quietly "Making .venv" "$python" -m venv .venv
fi
quietly "Installing $target with torch 2.9.0 and torch_xla 2.9.0 (about 2 minutes and 7 GB the first time)" \
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --editable "$target"
echo "$wanted" | tee .venv/.installed ${extra:+"$stamp"} >/dev/null  # the tests' stamp covers running, too
