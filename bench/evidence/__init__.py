"""One harness for all methods: task x model x method x rank x seed -> one row of results.

    python -m bench.evidence tune --model smollm2 --tasks phonemes --rows rates.jsonl
    python -m bench.evidence run --model smollm2 --tasks phonemes --seeds 0 1 2 --rates rates.jsonl --rows rows.jsonl
    python -m bench.evidence.report rows.jsonl rates.jsonl --out results

The rules, the same for every method:

- equal steps, equal batches in equal order: the order depends on the seed alone;
- one training loop (`loop`): AdamW, warm-up and half a cosine, gradients clipped; scale lora_alpha / r = 2;
- a learning rate for each method and rank, the best on the validation data of one task, then used for all tasks;
- results on test data, which nothing is chosen on.

Finished rows are never run again: a run can be cut at any moment, and the same command goes on. `--ray` spreads the
jobs over a cluster, whose machines need this repository on their Python path.

==============  =============================================================================
tasks           where examples come from; `load` also takes a loader or data set of your own
learners        base models
methods         what is done to reach a rank
plan            from what is asked to the jobs that are missing; `tune` finds learning rates
work, loop      one job: training and everything measured on its adapter
saved           adapters by way of files: squeezes, and other methods of PEFT
report          tables, curves and verdicts from rows
==============  =============================================================================
"""
