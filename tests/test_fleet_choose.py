"""The choice of ranks: never more than the memory, and against every other choice that there is."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from fleet_cases import refusal

from lora_squeeze.fleet.choose import Budget, Choice, choose_ranks
from lora_squeeze.fleet.members import Member
from lora_squeeze.servers import Server, server_of

VLLM, SGLANG, PEFT = server_of("vllm"), server_of("sglang"), server_of("peft")
ITEMSIZE, PER_RANK = 2, 100
Fleet = tuple[dict[str, Member], dict[str, list[float]], dict[str, float]]


def member(name: str, rank: int, per_rank: int = PER_RANK, step: int = 1) -> Member:
    return Member(name, Path(name), "base", rank, step, {(rank // step, step): per_rank}, (0, 0, 0, 0))


def random_fleet(seed: int, count: int = 3, top: int = 6) -> Fleet:
    """Members of random ranks, spectra, sizes and weights."""
    draw = random.Random(seed)
    members, losses, weights = {}, {}, {}
    for name in "abcd"[:count]:
        rank = draw.randint(1, top)
        energies = sorted((draw.random() ** 4 for _ in range(rank)), reverse=True)
        members[name] = member(name, rank, draw.randint(5, PER_RANK))
        losses[name] = [math.fsum(energies[k:]) / math.fsum(energies) for k in range(1, rank + 1)]
        weights[name] = draw.choice([0.1, 1.0, 7.0])
    return members, losses, weights


def loss_of(fleet: Fleet, ranks: Mapping[str, int]) -> float:
    _, losses, weights = fleet
    return sum(weights[n] * losses[n][k - 1] for n, k in ranks.items()) / sum(weights.values())


def every(members: Mapping[str, Member], ceiling: int) -> Iterator[dict[str, int]]:
    """All ranks that the members can have."""
    choices = [range(m.floor, min(m.rank, ceiling) + 1) for m in members.values()]
    return (dict(zip(members, ranks, strict=True)) for ranks in itertools.product(*choices))


def run(fleet: Fleet, server: Server, budget: Budget) -> Choice:
    choice = choose_ranks(*fleet, server, budget)
    assert math.isclose(choice.loss, loss_of(fleet, choice.ranks), abs_tol=1e-12)
    assert all(m.floor <= choice.ranks[n] <= m.rank for n, m in fleet[0].items())
    return choice


SLOT_RANKS = {"vllm": VLLM.limits, "sglang": range(1, 100)}


@pytest.mark.parametrize("server", [VLLM, SGLANG], ids=lambda server: server.key)
@pytest.mark.parametrize("seed", range(6))
def test_no_other_rank_of_slots_and_ranks_of_members_lose_less(server: Server, seed: int) -> None:
    fleet = random_fleet(seed, top=9)
    slots = 2 + seed % 2
    for memory in range(slots * PER_RANK * ITEMSIZE, 10 * slots * PER_RANK * ITEMSIZE, 3 * PER_RANK):
        budget = Budget(memory, slots, ITEMSIZE, PER_RANK)
        choice = run(fleet, server, budget)
        assert choice.max_rank is not None and choice.bytes == slots * choice.max_rank * PER_RANK * ITEMSIZE <= memory
        assert max(choice.ranks.values()) <= choice.max_rank
        feasible = [rank for rank in SLOT_RANKS[server.key] if slots * rank * PER_RANK * ITEMSIZE <= memory]
        best = min(loss_of(fleet, ranks) for rank in feasible for ranks in every(fleet[0], rank))
        assert choice.loss <= best + 1e-12


def test_slots_are_no_larger_than_the_largest_adapter_needs() -> None:
    fleet = random_fleet(1, top=9)
    top = max(m.rank for m in fleet[0].values())
    plenty = Budget(10**9, 3, ITEMSIZE, PER_RANK)
    assert run(fleet, VLLM, plenty).max_rank == next(rank for rank in VLLM.limits if rank >= top)
    assert run(fleet, SGLANG, plenty).max_rank == top
    large = {"a": member("a", 1000)}, {"a": [0.0] * 1000}, {"a": 1.0}
    assert run(large, VLLM, plenty).ranks == {"a": VLLM.limits[-1]}, "a server's last rank is the largest"


@pytest.mark.parametrize(("server", "option"), [(VLLM, "--host-memory"), (PEFT, "--memory")], ids=["host", "own"])
@pytest.mark.parametrize("seed", range(6))
def test_a_budget_at_own_ranks_is_kept_and_spent_as_well_as_possible(server: Server, option: str, seed: int) -> None:
    """Against all choices: never more than one step of a member away from the best."""
    fleet = members, losses, weights = random_fleet(seed)
    least = sum(m.parameters(1) for m in members.values()) * ITEMSIZE
    whole = sum(m.parameters(m.rank) for m in members.values()) * ITEMSIZE

    def budget(size: int) -> Budget:
        host = option == "--host-memory"
        return Budget(10**9 if host else size, 3, ITEMSIZE, PER_RANK, size if host else None)

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(members[n].parameters(k) for n, k in ranks.items()) * ITEMSIZE

    choices = [(cost(ranks), loss_of(fleet, ranks)) for ranks in every(members, 99)]
    step = max(
        w * (before - after) for n, w in weights.items() for before, after in itertools.pairwise([1, *losses[n]])
    )
    exact = 0
    for size in range(least, whole + 1, max(1, (whole - least) // 40)):
        choice = run(fleet, server, budget(size))
        assert cost(choice.ranks) == choice.host_bytes <= size
        best = min(loss for bytes_, loss in choices if bytes_ <= size)
        assert best - 1e-12 <= choice.loss <= best + step / sum(weights.values())
        exact += math.isclose(choice.loss, best, abs_tol=1e-12)
        assert choice.max_rank is None or choice.max_rank == min(
            r for r in VLLM.limits if r >= max(choice.ranks.values())
        )
    assert exact >= 20, "mostly, it is the best"
    assert run(fleet, server, budget(whole)).loss == 0
    text = refusal(lambda: run(fleet, server, budget(least - 1)))
    assert (
        f"{least - 1:,} bytes ({option}) are too little for 3 adapters: at their smallest ranks they take {least:,}"
        in text
    )


def test_weights_decide_who_keeps_rank() -> None:
    members = {name: member(name, 8) for name in "ab"}
    losses = {name: [1 - k / 8 for k in range(1, 9)] for name in members}
    half = Budget(8 * PER_RANK * ITEMSIZE, 1, ITEMSIZE, 0)
    for heavy, light in ("ab", "ba"):
        choice = run((members, losses, {heavy: 2.0, light: 1.0}), PEFT, half)
        assert choice.ranks == {heavy: 7, light: 1}


def test_an_adapter_that_changes_nothing_gets_the_least() -> None:
    members = {"a": member("a", 8), "zero": member("zero", 8)}
    losses = {"a": [1 - k / 8 for k in range(1, 9)], "zero": [0.0] * 8}
    weights = {"a": 1.0, "zero": 100.0}
    choice = run((members, losses, weights), PEFT, Budget(8 * PER_RANK * ITEMSIZE, 1, ITEMSIZE, 0))
    assert choice.ranks == {"a": 7, "zero": 1}


def test_ranks_that_count_in_steps_are_seen_as_a_whole() -> None:
    """A convolution of four groups gains nothing at ranks 5 to 7, and all of the rest at 8."""
    members = {"conv": member("conv", 8, step=4), "a": member("a", 8)}
    losses = {"conv": [0.5] * 7 + [0.0], "a": [0.1 - k / 80 for k in range(1, 9)]}
    room = members["conv"].parameters(8) + members["a"].parameters(1)
    budget = Budget(room * ITEMSIZE, 1, ITEMSIZE, 0)
    weights = dict.fromkeys(members, 1.0)
    assert choose_ranks(members, losses, weights, PEFT, budget).ranks == {"conv": 8, "a": 1}
    text = refusal(lambda: choose_ranks(members, losses, weights, VLLM, Budget(4 * 2 * 100, 1, 2, 100)))
    assert "are too little for 1 slots: at the smallest rank, 8," in text, "rank 1 is none that it can have"


def test_a_member_that_no_slot_can_hold_is_named() -> None:
    members = {"conv": member("conv", 2048, step=1024)}
    budget = Budget(10**12, 1, ITEMSIZE, PER_RANK)
    text = refusal(lambda: choose_ranks(members, {"conv": [0.0] * 2048}, {"conv": 1.0}, VLLM, budget))
    assert text.startswith("conv cannot have less than rank 1024, vLLM takes no rank above 512; leave it out")


def test_too_little_memory_says_how_much_is_needed_and_what_fits() -> None:
    fleet = random_fleet(0)
    slot = PER_RANK * ITEMSIZE
    text = refusal(lambda: run(fleet, VLLM, Budget(5 * slot - 1, 5, ITEMSIZE, PER_RANK)))
    assert f"{5 * slot - 1:,} bytes (--memory) are too little for 5 slots: at the smallest rank, 1, they take" in text
    assert f"they take {5 * slot:,}; 4 slots of that rank fit: give more memory, or fewer --slots" in text


@pytest.mark.parametrize("server", [VLLM, SGLANG, PEFT], ids=lambda server: server.key)
def test_the_curve_has_the_figures_of_every_rank(server: Server) -> None:
    fleet = members, losses, _ = random_fleet(2, top=20)
    memory = 3 * 9 * PER_RANK * ITEMSIZE
    choice = run(fleet, server, Budget(memory, 3, ITEMSIZE, PER_RANK))
    top = max(m.rank for m in members.values())
    assert [point.rank for point in choice.curve] == sorted({point.rank for point in choice.curve})
    assert choice.curve[-2].rank < top <= choice.curve[-1].rank
    assert [point.rank for point in choice.curve if point.chosen] == [r for r in [choice.max_rank] if r is not None]
    for point in choice.curve:
        ranks = {n: min(m.rank, point.rank) for n, m in members.items()}
        lost = {n: losses[n][k - 1] for n, k in ranks.items()}
        assert math.isclose(point.loss, loss_of(fleet, ranks), abs_tol=1e-12)
        assert point.worst_loss == max(lost.values()) and lost.get(point.worst, 0.0) == point.worst_loss
        slot = point.rank * PER_RANK * ITEMSIZE
        own = sum(members[n].parameters(k) for n, k in ranks.items()) * ITEMSIZE
        assert point.bytes == (own if server is PEFT else 3 * slot) and point.fits == (point.bytes <= memory)
        expected: Sequence[int | None] = (None, None) if server is PEFT else (slot, memory // slot)
        assert [point.slot_bytes, point.slots_fit] == list(expected)
