"""Sends requests to an OpenAI-compatible server through the openai client, all at once, and takes the time.

Reads {"url", "requests": [{"model", "prompt"}], "tokens"} as JSON from standard input; every request gets exactly that
many tokens. Writes {"seconds", "tokens"}.
"""

import asyncio
import json
import sys
import time

from openai import AsyncOpenAI


async def ask(client, request, tokens):
    answer = await client.completions.create(
        model=request["model"],
        prompt=request["prompt"],
        max_tokens=tokens,
        temperature=0.0,
        extra_body={"ignore_eos": True},
    )
    return answer.usage.completion_tokens


async def main(job):
    async with AsyncOpenAI(base_url=job["url"] + "/v1", api_key="none", max_retries=0, timeout=600) as client:
        await client.models.list()  # the connection is there
        start = time.perf_counter()
        done = await asyncio.gather(*(ask(client, request, job["tokens"]) for request in job["requests"]))
        return {"seconds": time.perf_counter() - start, "tokens": sum(done)}


json.dump(asyncio.run(main(json.load(sys.stdin))), sys.stdout)
