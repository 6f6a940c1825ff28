"""In-Squeeze from rank 64 in halvings, its learning rate continued or risen with the rank: loss on validation data.

    PYTHONPATH=. python records/2026-11-29-rising-rate/rising.py TASK RANKS RATES POLICY

RANKS and RATES by commas; POLICY is "continue" or "rank". One line for each run, seed 0.
"""

import json
import sys

from bench.evidence import methods, tasks
from bench.evidence.learners import learner
from bench.evidence.loop import evaluate, order, train
from peft import LoraConfig

STEPS, BATCH, SEED = 200, 16, 0

task, ranks, rates, policy = sys.argv[1:]
mini, data = learner("minilm"), tasks.load(task)
batches = mini.batches(data, order(mini.usable(data, data.train), BATCH * STEPS, SEED), BATCH)
measured = mini.batches(data, mini.usable(data, data.validation)[:256], 32)
for rank in map(int, ranks.split(",")):
    for rate in map(float, rates.split(",")):
        config = LoraConfig(r=64, lora_alpha=128, target_modules=mini.targets, task_type=mini.task_type)
        model = mini.attach(config, data, SEED)
        train(mini, model, batches, rate, methods.SCHEDULES["in-equal"](64, rank, STEPS), learning_rate=policy)
        found = evaluate(mini, model, measured)
        row = {"task": task, "seed": SEED, "policy": policy, "rank": rank, "rate": rate}
        print(json.dumps({**row, "loss": round(found["loss"], 4), "acc": found["accuracy"]}), flush=True)
