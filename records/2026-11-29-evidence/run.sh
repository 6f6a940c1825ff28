#!/usr/bin/env bash
# All runs of this record, those first that answer most. Cut at any moment and started again, it goes on where it was.
# About 20 hours of one core; there are as many workers as cores. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
here=records/2026-11-29-evidence
evidence() { "${PYTHON:-.venv/bin/python}" -W ignore -m bench.evidence "$@"; }
run() { evidence run --model "$1" --rates $here/"$1"-rates.jsonl "${earlier[@]}" --rows $here/"$1".jsonl "${@:2}"; }

# MiniLM: four tasks, three seeds. In-Squeeze with a rising rate as well; SmolLM2's budget has no room for it.
earlier=(records/2026-11-29-rising-rate/rates.jsonl)
arms=(direct post post-data plan plan-data cont in-equal in-proportional in-equal-rising in-proportional-rising)
evidence tune --model minilm --tasks sentiment --rates "${earlier[@]}" --rows $here/minilm-rates.jsonl --methods "${arms[@]}"
run minilm --methods "${arms[@]}" --seeds 0 1 2 --tasks sentiment syllables maths-digit maths-compare
earlier=()

# SmolLM2: 13 tasks, one seed.
evidence tune --model smollm2 --tasks phonemes --rows $here/smollm2-rates.jsonl
run smollm2 --tasks phonemes sentiment countries maths-add \
    syllables number-words words-numbers dates maths-linear maths-sort maths-round maths-digit maths-compare

# The vision-language model: 10 tasks, one seed.
evidence tune --model vlm --tasks picture-digit --rows $here/vlm-rates.jsonl
run vlm --tasks picture-digit picture-sum \
    picture-parity picture-count picture-compare picture-difference picture-colour picture-place picture-binding picture-row

# Two more seeds.
run vlm --seeds 1 2 --tasks picture-digit picture-sum
run smollm2 --seeds 1 2 --tasks phonemes sentiment countries maths-add
