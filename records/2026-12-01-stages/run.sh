#!/usr/bin/env bash
# All runs of this record, at the source's learning rate first. Cut and started again, it goes on where it was.
# About an hour and a half of one core; there are as many workers as cores. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 # glibc keeps the pages of large tensors
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1                                # and asks for huge ones
for rate in 3e-4 1e-3; do
    "${PYTHON:-.venv/bin/python}" -W ignore -m bench.evidence run --model smollm2 --rate $rate --ranks 8 2 \
        --tasks phonemes sentiment countries maths-add words-numbers \
        --methods in-equal in-proportional in-equal-restart in-proportional-restart in-proportional-restart-rising \
        --rows records/2026-12-01-stages/rate-$rate.jsonl
done
