#!/usr/bin/env bash
# All runs of this record, those first that answer most. Cut at any moment and started again, it goes on where it was.
# About 24 hours of one core; there are as many workers as cores. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
here=records/2026-11-29-evidence
failed=0
evidence() { "${PYTHON:-.venv/bin/python}" -W ignore -m bench.evidence "$@"; }
tune() { evidence tune --model "$1" --rows $here/"$1"-rates.jsonl "${@:2}"; }
run() { evidence run --model "$1" --rates $here/"$1"-rates.jsonl --rows $here/"$1".jsonl "${@:2}" || failed=1; }

# MiniLM: four tasks, three seeds; what the learning rate does after a squeeze.
arms=(direct post post-data plan plan-data cont in-equal in-equal-restart in-equal-rising)
tune minilm --methods "${arms[@]}" --tasks sentiment syllables
run minilm --methods "${arms[@]}" --seeds 0 1 2 --tasks sentiment syllables maths-digit maths-compare
exit $failed
