#!/usr/bin/env bash
# Runs the published benchmarks (more than an hour) and refreshes the tables in docs/performance.md and README.md.
#   scripts/bench.sh            everything
#   scripts/bench.sh speed      prefill and decode
#   scripts/bench.sh positions  decoding far into the cache
#   scripts/bench.sh startup    process start to first token, and full warm-ups
#   scripts/bench.sh drafting   plain decoding beside every drafter, and what a step that checks drafts costs
# drafting measures the drafter model if DRAFT_CKPT_DIR names a smaller model with the demo model's vocabulary.
# Needs the extra: pip install -e '.[bench]' (llama.cpp is built from source). Nothing else should run on the machine meanwhile.
# Start-up is compared with an older commit in a temporary worktree, where the repository has that commit.
# It writes up to 9 GB of random weights to the temporary directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
part=${1:-all}
case $part in all | speed | positions | startup | drafting) ;; *)
  echo "bench.sh: got '$part', expected speed, positions, startup, drafting or nothing" >&2
  exit 2
  ;;
esac
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
results=$(mktemp --suffix .jsonl)
echo "== results as they come: $results" >&2

run() {
  echo "== bench $*" >&2
  "$python" -m llama.cli bench "$@" -o jsonl | tail -n 1 >>"$results"
}

wants() {
  [ "$part" = all ] || [ "$part" = "$1" ]
}

if wants speed; then
  run --shape demo -p 64 -n 64 -r 5
  run --shape 110m -p 512 -n 64 -r 5 --compare hf --compare llama.cpp
  run --shape 110m -p 512 -n 64 -r 5 --dtype bfloat16 --compare hf --compare llama.cpp
  run --shape 110m -p 512 -n 64 -r 5 --dtype int8 --compare llama.cpp
  run --shape 110m -p 512 -n 64 -r 5 --dtype int4 --compare llama.cpp
  run --shape 110m -p 512 -n 64 -r 5 --batch 8 --compare hf
  run --shape 110m -p 128 -n 64 -r 5 --batch 8,32 --compare llama.cpp
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
  run --shape 1.1b -p 512 -n 32 -r 3 --dtype int4 --compare llama.cpp
  run --shape 1.1b -p 128 -n 32 -r 2 --batch 1,8
fi

if wants positions; then
  run --shape 110m --positions 1024,2048,4096,8000 -n 32 -r 3 --compare llama.cpp --plot docs/positions.png
fi

if wants startup; then
  older=a24bb4a # before slots
  scratch=$(mktemp -d)
  remove_scratch() {
    git worktree remove --force "$scratch/older" 2>/dev/null || true
    rm -rf "$scratch"
  }
  trap remove_scratch EXIT
  beside=()
  if git cat-file -e "$older^{commit}" 2>/dev/null && git worktree add --quiet --detach "$scratch/older" "$older"; then
    beside=(--other_version "$scratch/older")
  else
    echo "== commit $older is not here, as in a shallow clone: start-up is measured without it" >&2
  fi
  run --startup --shape demo -p 64 -r 5 "${beside[@]}"
  run --startup --shape 110m -p 512,1501 -r 5 --compare llama.cpp --plot docs/startup.png "${beside[@]}"
  run --startup --shape 1.1b -p 512 -r 3 --compare llama.cpp "${beside[@]}"
  run --warm_up --shape 110m --n_layers 12,32 --batch 1,8 -r 1 "${beside[@]}"
fi

if wants drafting; then
  drafters=auto,lookup,suffix,lookahead,medusa,retrieval
  smaller=()
  if [ -n "${DRAFT_CKPT_DIR:-}" ]; then
    drafters+=,model
    smaller=(--draft_ckpt_dir "$DRAFT_CKPT_DIR")
  else
    echo "== DRAFT_CKPT_DIR is not set: the drafter model is left out" >&2
  fi
  run --drafter "$drafters" --each "${smaller[@]}" --batch 1,4,8 -r 3 --plot docs/drafting.png
  for shape in 110m 1.1b; do
    for dtype in float32 bfloat16 int8; do
      run --verify_cost --shape "$shape" --dtype "$dtype"
    done
  done
fi
"$python" scripts/bench_table.py "$results" docs/performance.md README.md
