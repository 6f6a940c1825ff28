"""The memory rule: bytes of slots against the tensors that a server allocates, and the options to start it with."""

import itertools

import pytest
import torch

from lora_squeeze.fleet.choose import Budget
from lora_squeeze.fleet.members import Shape
from lora_squeeze.fleet.memory import remarks, slot_parameters, start_options, targets
from lora_squeeze.servers import SERVERS, server_of

VLLM, SGLANG = server_of("vllm"), server_of("sglang")
HIDDEN, Q, KV, MIDDLE, EXPERTS = 24, 32, 8, 40, 3
ATTENTION = {"q_proj": Shape(Q, HIDDEN), "k_proj": Shape(KV, HIDDEN), "v_proj": Shape(KV, HIDDEN)}
DENSE = {**ATTENTION, "o_proj": Shape(HIDDEN, Q)}
MLP = {
    "gate_proj": Shape(MIDDLE, HIDDEN),
    "up_proj": Shape(MIDDLE, HIDDEN),
    "down_proj": Shape(HIDDEN, MIDDLE),
}
STACK = {
    "experts.gate_up_proj": Shape(2 * MIDDLE, HIDDEN, EXPERTS),
    "experts.down_proj": Shape(HIDDEN, MIDDLE, EXPERTS),
}


def layers(shapes: dict[str, Shape], count: int = 2) -> dict[str, Shape]:
    return {f"layers.{i}.block.{name}": shape for i in range(count) for name, shape in shapes.items()}


def allocated(shapes: dict[str, Shape], slots: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of the zero tensors that a padded server makes: A and B of every slice, for all slots at once."""
    tensors = [
        torch.zeros(slots, shape.copies, *size, dtype=dtype)
        for shape in shapes.values()
        for size in ((rank, shape.in_features), (shape.out_features, rank))
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("server", [VLLM, SGLANG], ids=lambda server: server.key)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("slots", "rank"), [(1, 1), (3, 8), (5, 16)])
def test_slots_take_what_the_tensors_take(server: object, dtype: torch.dtype, slots: int, rank: int) -> None:
    shapes = layers(DENSE | MLP)
    per_rank, notes = slot_parameters(shapes, server)  # type: ignore[arg-type]
    needed = allocated(shapes, slots, rank, dtype)
    assert not notes
    for memory, fits in ((needed - 1, slots - 1), (needed, slots)):
        budget = Budget(memory, slots, dtype.itemsize, per_rank)
        assert slots * budget.slot_bytes(rank) == needed and budget.slots_fit(rank) == fits


SUBSETS = [part for n in (1, 2, 3) for part in itertools.combinations(ATTENTION, n)]


@pytest.mark.parametrize("used", SUBSETS, ids="+".join)
def test_slices_that_no_adapter_changes_are_counted(used: tuple[str, ...]) -> None:
    """Their sizes are known from another layer."""
    whole = layers(ATTENTION)
    some = {name: s for name, s in whole.items() if not name.startswith("layers.1") or name.endswith(used)}
    assert slot_parameters(some, VLLM) == slot_parameters(whole, VLLM) == (allocated(whole, 1, 1, torch.int8), ())


@pytest.mark.parametrize("used", SUBSETS[:-1], ids="+".join)
def test_slices_of_unknown_size_are_counted_from_above_and_told(used: tuple[str, ...]) -> None:
    shapes = layers({name: DENSE[name] for name in (*used, "o_proj")})
    found, notes = slot_parameters(shapes, VLLM)
    # q is as large as o, and k as v
    missing = [name for name in ATTENTION if name not in used and name != "q_proj" and used == ("q_proj",)]
    assert found >= allocated(layers(DENSE), 1, 1, torch.int8)
    if missing:
        assert f"vLLM gives slots to {', '.join(missing)} too, which no adapter changes: counted as large" in notes[0]
    else:
        assert not notes and found == allocated(layers(DENSE), 1, 1, torch.int8)


def test_a_guess_of_q_says_that_it_may_be_too_small() -> None:
    assert "though q_proj may be larger" in slot_parameters(layers({"v_proj": Shape(KV, HIDDEN)}), VLLM)[1][0]


@pytest.mark.parametrize("used", list(MLP)[:2])
def test_gate_and_up_have_one_size(used: str) -> None:
    both = layers({name: MLP[name] for name in ("gate_proj", "up_proj")})
    assert slot_parameters(layers({used: MLP[used]}), VLLM)[0] == slot_parameters(both, VLLM)[0]


@pytest.mark.parametrize("used", list(STACK))
def test_all_projections_of_experts_have_slots(used: str) -> None:
    whole = allocated(layers(STACK), 1, 1, torch.int8)
    assert slot_parameters(layers(STACK), VLLM) == (whole, ())
    found, notes = slot_parameters(layers({used: STACK[used]}), VLLM)
    assert found >= whole and notes
    single = {f"experts.{i}.{name}": shape for i in range(EXPERTS) for name, shape in MLP.items()}
    part = {name: shape for name, shape in single.items() if name.endswith("up_proj")}
    assert slot_parameters(layers(part), VLLM)[0] == allocated(layers(single), 1, 1, torch.int8)


def test_the_options_name_what_the_fleet_changes() -> None:
    shapes = layers({"q_proj": Shape(Q, HIDDEN), "v_proj": Shape(KV, HIDDEN), **STACK})
    assert targets(shapes) == ["experts", "q_proj", "v_proj"]
    assert start_options(VLLM, shapes, 16, 4, 9) == (
        "--enable-lora --max-lora-rank 16 --max-loras 4 --max-cpu-loras 9 --lora-target-modules experts q_proj v_proj"
    )
    assert start_options(SGLANG, layers(DENSE), 5, 4, 4) == (
        "--enable-lora --max-lora-rank 5 --max-loras-per-batch 4 --max-loaded-loras 4 "
        "--lora-target-modules k_proj o_proj q_proj v_proj"
    )


def test_remarks_name_the_members_they_are_about() -> None:
    assert remarks(VLLM, []) == []
    assert remarks(SGLANG, []) == ["requests without an adapter need a slot too: ask for one more if there are any"]
    (text,) = remarks(VLLM, ["a", "b"])
    assert text.startswith("a, b change only some layers (layers_to_transform): vLLM gives slots to every layer")


def test_every_server_has_a_key_of_its_own() -> None:
    assert [server_of(server.key) for server in SERVERS] == list(SERVERS)
    assert all(bool(server.options) == (server.keeps == "padded") for server in SERVERS)
    with pytest.raises(Exception, match=r"unknown engine 'tgi': choose one of vllm, sglang, peft, llama\.cpp"):
        server_of("tgi")
