"""Greedy answers of llama.cpp, with all adapters loaded at once and one chosen by each request.

Reads {"model", "adapters": [file], "requests": [{"adapter": index or null, "prompt": token ids}], "tokens"} as JSON
from standard input; writes a list of {"prompt", "tokens", "log_probs"} in the order of the requests.
"""

import json
import os
import sys

import xllamacpp

TOP = 5


def server(job):
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in job["adapters"]]
    return xllamacpp.Server(params)


def ask(engine, request, count, tokens):
    scales = [{"id": i, "scale": float(i == request["adapter"])} for i in range(count)]
    said = engine.handle_completions(
        {
            "prompt": request["prompt"],
            "n_predict": tokens,
            "temperature": 0.0,
            "n_probs": TOP,
            "post_sampling_probs": False,
            "cache_prompt": False,
            "lora": scales,
        }
    )
    found = said["choices"][0]["logprobs"]["content"]
    return {
        "prompt": request["prompt"],
        "tokens": [step["id"] for step in found],
        "log_probs": [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in found],
    }


out = os.dup(1)
os.dup2(2, 1)  # llama.cpp prints to standard output
job = json.load(sys.stdin)
engine = server(job)
answers = [ask(engine, request, len(job["adapters"]), job["tokens"]) for request in job["requests"]]
with os.fdopen(out, "w") as file:
    json.dump(answers, file)
