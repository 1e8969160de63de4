#!/usr/bin/env bash
# Runs the published benchmarks (about 25 minutes) and refreshes the tables in docs/performance.md and README.md.
# Needs the extra: pip install -e '.[bench]' (llama.cpp is built from source). Nothing else should run on the machine meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
results=$(mktemp --suffix .jsonl)
echo "== results as they come: $results" >&2

run() {
  echo "== bench $*" >&2
  "$python" -m llama.cli bench "$@" -o jsonl | tail -n 1 >>"$results"
}

run --shape demo -p 64 -n 64 -r 5
run --shape 110m -p 512 -n 64 -r 5 --compare hf --compare llama.cpp
run --shape 110m -p 512 -n 64 -r 5 --dtype bfloat16 --compare hf --compare llama.cpp
run --shape 110m -p 512 -n 64 -r 5 --dtype int8 --compare llama.cpp
run --shape 110m -p 512 -n 64 -r 5 --batch 8 --compare hf
run --shape 110m -p 700 -n 256 -r 3 --compare hf --compare llama.cpp
run --shape 110m -p 1500 -n 2 -r 1
run --shape 110m -p 1500 -n 2 -r 1 --buckets 1
run --shape 110m -p 200 -n 32 -r 5 --max_seq_len 512
run --shape 110m -p 200 -n 32 -r 5 --max_seq_len 4096
for dtype in float32 int8; do
  run --shape 110m --vocab_size 128256 -p 16 -n 8 -r 1 --dtype "$dtype" --batch 1,8 --heads greedy --heads sample --heads full --heads logprobs
done
run --shape 1.1b -p 512 -n 32 -r 3 --compare hf --compare llama.cpp
run --shape 1.1b -p 512 -n 32 -r 3 --dtype bfloat16 --compare llama.cpp
run --shape 1.1b -p 512 -n 32 -r 3 --dtype int8 --compare llama.cpp
run --shape 1.1b -p 128 -n 32 -r 2 --batch 1,8
"$python" scripts/bench_table.py "$results" docs/performance.md README.md
