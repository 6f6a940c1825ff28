#!/usr/bin/env bash
# All runs of this record, those first that answer most. Cut at any moment and started again, it goes on where it was.
# More than a day of one core; there are as many workers as cores. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 # glibc keeps the pages of large tensors
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1                                # and asks for huge ones
here=records/2026-11-29-evidence
failed=0
evidence() { "${PYTHON:-.venv/bin/python}" -W ignore -m bench.evidence "$@"; }
tune() { evidence tune --model "$1" --rows $here/"$1"-rates.jsonl "${@:2}"; }
run() { evidence run --model "$1" --rates $here/"$1"-rates.jsonl --rows $here/"$1".jsonl "${@:2}" || failed=1; }

# MiniLM: four tasks, three seeds; what the learning rate does after a squeeze. "-restart" had the lowest mean loss.
arms=(direct post post-data plan plan-data cont in-equal in-equal-restart in-equal-rising in-proportional-restart
    in-equal-restart-rising)
tune minilm --methods "${arms[@]}" --tasks sentiment syllables
run minilm --methods "${arms[@]}" --seeds 0 1 2 --tasks sentiment syllables maths-digit maths-compare

# SmolLM2: thirteen tasks.
arms=(direct post post-data plan plan-data cont in-equal-restart in-proportional-restart)
four=(phonemes sentiment countries maths-add)
tune smollm2 --methods "${arms[@]}" --tasks phonemes maths-digit
run smollm2 --methods "${arms[@]}" --tasks "${four[@]}"
run smollm2 --methods "${arms[@]}" --tasks syllables number-words words-numbers dates \
    maths-digit maths-compare maths-round maths-linear maths-sort

# The vision-language model: ten tasks; two of them with three seeds. Its tower is trained first, a quarter of an hour.
two=(picture-digit picture-binding)
tune vlm --methods "${arms[@]}" --tasks "${two[@]}"
run vlm --methods "${arms[@]}" --tasks "${two[@]}" picture-parity picture-count picture-compare picture-sum \
    picture-difference picture-colour picture-place picture-row
run vlm --methods "${arms[@]}" --seeds 1 2 --tasks "${two[@]}"

# Two more seeds of three tasks.
run smollm2 --methods "${arms[@]}" --seeds 1 2 --tasks "${four[@]:0:3}"
exit $failed
