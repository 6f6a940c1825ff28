"""Asks an OpenAI-compatible server through the openai client, all requests at once.

Reads {"url", "model", "requests": [{"model", "prompt"}], "tokens"} as JSON from standard input; writes a list of
{"prompt", "tokens", "log_probs"} in the order of the requests.
"""

import asyncio
import json
import sys

from openai import AsyncOpenAI

ID = "token_id:"


async def ask(client, request, tokens):
    answer = await client.completions.create(
        model=request["model"],
        prompt=request["prompt"],
        max_tokens=tokens,
        temperature=0.0,
        logprobs=5,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": False},
    )
    choice = answer.choices[0]
    tops = [{int(name.removeprefix(ID)): value for name, value in top.items()} for top in choice.logprobs.top_logprobs]
    return {"prompt": choice.prompt_token_ids, "tokens": choice.token_ids, "log_probs": tops}


async def main(job):
    async with AsyncOpenAI(base_url=job["url"] + "/v1", api_key="none", max_retries=0, timeout=300) as client:
        return await asyncio.gather(*(ask(client, request, job["tokens"]) for request in job["requests"]))


json.dump(asyncio.run(main(json.load(sys.stdin))), sys.stdout)
