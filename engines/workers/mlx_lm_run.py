"""Greedy answers of mlx-lm, with one adapter at a time.

Reads {"model", "adapters": [folder or null], "prompts": [token ids], "tokens"} as JSON from standard input; writes, for
each adapter, a list of {"prompt", "tokens", "log_probs"}.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load, stream_generate

TOP = 5


def ask(model, tokenizer, prompt, tokens):
    answer = {"prompt": prompt, "tokens": [], "log_probs": []}
    for step in stream_generate(model, tokenizer, prompt, max_tokens=tokens):
        top = mx.argsort(-step.logprobs)[:TOP].tolist()
        answer["tokens"].append(step.token)
        answer["log_probs"].append({token: step.logprobs[token].item() for token in top})
    return answer


mx.set_default_device(mx.cpu)
job = json.load(sys.stdin)
# transformers 5 writes rope_theta in a group that mlx-lm 0.32 does not look into: it would take its own default.
rope = json.loads(Path(job["model"], "config.json").read_text()).get("rope_parameters", {})
settings = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
answers = []
for adapter in job["adapters"]:
    model, tokenizer = load(job["model"], adapter_path=adapter, model_config=settings)
    answers.append([ask(model, tokenizer, prompt, job["tokens"]) for prompt in job["prompts"]])
json.dump(answers, sys.stdout)
