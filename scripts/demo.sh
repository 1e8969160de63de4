#!/usr/bin/env bash
# Continue a text with the shipped demo model on the PJRT CPU device. Installs everything first if needed.
#   ./scripts/demo.sh "Once upon a time"
#   ./scripts/demo.sh "Once upon a time" --temperature 0 --max_gen_len 100      any flag of `llama-xla generate`
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
"$here/setup.sh"

prompt=()
if (($#)) && [[ "$1" != --* ]]; then
  prompt=("--prompt=$1")
  shift
fi
if [[ -t 0 ]]; then
  exec </dev/null  # without a prompt it continues the demo prompt, also at a terminal
fi
PJRT_DEVICE="${PJRT_DEVICE:-CPU}" exec "$here/../.venv/bin/llama-xla" generate ${prompt[@]+"${prompt[@]}"} --echo --stream "$@"
