"""Servers as data: which ranks they take, how they keep adapters. The sources name what was read or run, and when."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from lora_squeeze.errors import LoraSqueezeError


@dataclass(frozen=True)
class Server:
    """What one reader of adapters accepts.

    Args:
        name: for a person.
        key: for a command line.
        source: where this is read.
        keeps: "own": each adapter at its own size; "padded": in slots, each with room for the rank limit.
        limits: the values that its rank limit can be set to, ascending; empty: any.
        default: the limit that it starts with.
        flag: the option that sets it.
        refuses: kinds of carried tensors that it does not load.
        remark: what else a person has to do.
        packed: last parts of names of modules that are one layer there: where one of them has slots, all have.
        packed_experts: the same, for modules of experts.
        options: how it is started with padded slots; {rank}, {slots}, {cached} and {targets} are filled in.
        slot_remark: what a person has to know of its slots.
    """

    name: str
    key: str
    source: str
    keeps: Literal["padded", "own"] = "own"
    limits: tuple[int, ...] = ()
    default: int = 0
    flag: str = ""
    refuses: tuple[str, ...] = ()
    remark: str = ""
    packed: tuple[tuple[str, ...], ...] = ()
    packed_experts: tuple[tuple[str, ...], ...] = ()
    options: str = ""
    slot_remark: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a server takes it as it starts ("yes"), with an option ("option") or not at all ("no"), in words."""

    answer: Literal["yes", "option", "no"]
    text: str


_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

SERVERS = (
    Server(
        name="vLLM",
        key="vllm",
        keeps="padded",
        limits=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        default=16,
        flag="--max-lora-rank",
        refuses=("module to save", "bias", "lora bias"),
        packed=_PACKED,
        packed_experts=(("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"), ("gate_up_proj", "down_proj")),
        options="--enable-lora --max-lora-rank {rank} --max-loras {slots} --max-cpu-loras {cached} "
        "--lora-target-modules {targets}",
        source="vLLM 0.32.0: LoRAConfig (MaxLoRARanks), its check of PEFT configurations, and the layers' "
        "create_lora_weights, read November 2026; limits, slots and their bytes asked of it in make test-engines",
    ),
    Server(
        name="SGLang",
        key="sglang",
        keeps="padded",
        flag="--max-lora-rank",
        remark="with --max-lora-rank at least as large",
        packed=_PACKED,
        options="--enable-lora --max-lora-rank {rank} --max-loras-per-batch {slots} --max-loaded-loras {cached} "
        "--lora-target-modules {targets}",
        slot_remark="requests without an adapter need a slot too: ask for one more if there are any",
        source="SGLang: LoRAMemoryPool and the help of its server arguments, read November 2026",
    ),
    Server(
        name="PEFT and transformers",
        key="peft",
        source="PEFT 0.21: ranks are read from the file, without a limit",
    ),
    Server(
        name="llama.cpp",
        key="llama.cpp",
        remark="after conversion to GGUF",
        source="llama-adapter.cpp: each tensor brings its own rank, without a limit; read November 2026",
    ),
)


def server_of(key: str) -> Server:
    """The server of this key.

    Raises:
        LoraSqueezeError: there is none; the message lists those that there are.
    """
    found = next((server for server in SERVERS if server.key == key), None)
    if found is None:
        raise LoraSqueezeError(f"unknown engine {key!r}: choose one of {', '.join(server.key for server in SERVERS)}")
    return found


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
