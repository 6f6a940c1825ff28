"""Which servers take an adapter of a given rank. Read, not run: the sources name what was read and when."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Server:
    """What one reader of adapters accepts.

    Args:
        name: for a person.
        limits: the values that its rank limit can be set to, ascending; empty: it has no limit.
        default: the limit that it starts with.
        flag: the option that sets it.
        refuses: kinds of carried tensors that it does not load.
        remark: what else a person has to do.
        source: where this is read.
    """

    name: str
    source: str
    limits: tuple[int, ...] = ()
    default: int = 0
    flag: str = ""
    refuses: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a server takes it as it starts ("yes"), with an option ("option") or not at all ("no"), in words."""

    answer: Literal["yes", "option", "no"]
    text: str


SERVERS = (
    Server(
        name="vLLM",
        limits=(8, 16, 32, 64, 128, 256, 320, 512),
        default=16,
        flag="--max-lora-rank",
        refuses=("module to save", "bias", "lora bias"),
        source="vLLM's LoRAConfig (MaxLoRARanks) and its check of PEFT configurations, read November 2026",
    ),
    Server(name="PEFT and transformers", source="PEFT 0.21: ranks are read from the file, without a limit"),
    Server(
        name="llama.cpp",
        remark="after conversion to GGUF",
        source="llama-adapter.cpp: each tensor brings its own rank, without a limit; read November 2026",
    ),
)


def verdict(server: Server, rank: int, carried: Collection[str] = ()) -> Verdict:
    """What a server says to an adapter.

    Args:
        server: one of SERVERS.
        rank: the largest rank of any module.
        carried: kinds of the tensors beside the factors.
    """
    unwanted = [kind for kind in server.refuses if kind in carried]
    if unwanted:
        return Verdict("no", f"does not load what the file carries besides ({', '.join(unwanted)})")
    if not server.limits:
        return Verdict("yes", "any rank" + (f", {server.remark}" if server.remark else ""))
    if rank <= server.default:
        return Verdict("yes", f"fits the default limit of {server.default}")
    limit = next((limit for limit in server.limits if limit >= rank), None)
    if limit is None:
        return Verdict("no", f"takes no rank above {server.limits[-1]}")
    return Verdict("option", f"needs {server.flag} {limit}")
