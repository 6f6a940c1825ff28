"""Plans: the ranks of a squeeze as a file that can be read, edited and obeyed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_cases import PREFIX, RANK, SHAPES, WEIGHTS, dense, plain_config, plain_tensors, tail, write_folder

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.plan import Plan, PlanRow, make_plan
from lora_squeeze.ranks import ALLOCATIONS, RULES

VALUES = dict(rank=3, energy=0.9, error=0.3, size=6000, params=900, sv_ratio=4.0, sv_cumulative=0.8, sv_fro=0.95)
Q0, V0, Q1, DOWN = SHAPES


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(write_folder(tmp_path / "in"))


def ranks(adapter: Adapter) -> dict[str, int]:
    """As files count them, modules that left included."""
    return {name: module.rank * module.step for name, module in adapter.modules.items()} | dict.fromkeys(
        adapter.dropped, 0
    )


def edited(adapter: Adapter, path: Path, *changes: tuple[str, str], **dials: Any) -> Plan:
    """The plan of these dials after changes to its text, each a pattern and what takes its place."""
    make_plan(adapter, **dials).save(path)
    text = path.read_text()
    for old, new in changes:
        text, count = re.subn(old, new, text, flags=re.MULTILINE)
        assert count == 1, (old, text)
    path.write_text(text)
    return Plan.load(path)


# --- a plan and a squeeze ---------------------------------------------------------------------------------------------

LIMITS: list[dict[str, Any]] = [
    {},
    {"min_rank": 2, "max_rank": 6, "multiple_of": 2},
    {"ranks": (1, 3, 8)},
    {"same_rank_per": "type"},
    {"same_rank_per": "type", "ranks": [2, 4], "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_plan_has_the_ranks_of_the_squeeze_and_is_obeyed(
    adapter: Adapter, tmp_path: Path, rule: str, limits: dict[str, Any]
) -> None:
    """Over all dials; also after a way through both kinds of file."""
    for allocate in (None, *ALLOCATIONS):
        dials = {rule: VALUES[rule], "allocate": allocate, **limits}
        try:
            small = adapter.squeeze(**dials)
        except LoraSqueezeError as error:
            with pytest.raises(LoraSqueezeError, match=re.escape(str(error))):
                make_plan(adapter, **dials)
            continue
        plan = make_plan(adapter, **dials)
        assert plan.ranks == ranks(small)
        for name in ("plan.toml", "plan.json"):
            plan.save(tmp_path / name, force=True)
            assert ranks(adapter.squeeze(plan=Plan.load(tmp_path / name))) == ranks(small)


def test_obeying_a_plan_writes_what_the_squeeze_writes(adapter: Adapter, tmp_path: Path) -> None:
    dials: dict[str, Any] = {"size": "6kB", "dtype": torch.float16}
    make_plan(adapter, **dials).save(tmp_path / "plan.toml")
    adapter.squeeze(**dials).save(tmp_path / "direct")
    adapter.squeeze(plan=Plan.load(tmp_path / "plan.toml")).save(tmp_path / "planned")
    direct, planned = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("direct", "planned"))
    assert direct.keys() == planned.keys() and all(torch.equal(direct[key], planned[key]) for key in direct)
    assert (tmp_path / "planned" / WEIGHTS).stat().st_size <= 6000
    assert lora_squeeze.load(tmp_path / "planned").history[-1]["rule"] == "plan"


def test_a_plan_for_another_dtype_can_be_obeyed_in_a_third(adapter: Adapter) -> None:
    plan = make_plan(adapter, rank=3, dtype=torch.float16)
    assert {m.dtype for m in adapter.squeeze(plan=plan).modules.values()} == {torch.float16}
    assert {m.dtype for m in adapter.squeeze(plan=plan, dtype=torch.bfloat16).modules.values()} == {torch.bfloat16}


def test_predictions_are_what_the_dense_updates_say(adapter: Adapter, tmp_path: Path) -> None:
    plan = make_plan(adapter, params=900, name="mine")
    lost = whole = 0.0
    for name, row in plan.modules.items():
        update = dense(adapter, name)
        least, norm = tail(update, row.rank), float(update.norm())
        lost, whole = lost + least**2, whole + norm**2
        assert row.error == pytest.approx(least / norm, rel=1e-3, abs=1e-6), name
        assert row.source_rank == RANK
    small = adapter.squeeze(plan=plan)
    small.save(tmp_path / "out")
    assert plan.totals["energy"] == pytest.approx(1 - lost / whole, rel=1e-5)
    assert plan.totals["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert plan.totals["parameters"] == small.parameters <= 900
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= plan.totals["file_bytes"]
    assert (plan.adapter, plan.source_sha256) == ("mine", adapter.source.digest())


def test_an_edited_rank_is_obeyed_and_its_error_measured_anew(adapter: Adapter, tmp_path: Path) -> None:
    plan = edited(adapter, tmp_path / "plan.toml", (rf'^("{re.escape(Q1)}" = {{ rank = )3', r"\g<1>5"), rank=3)
    assert plan.ranks == dict.fromkeys(SHAPES, 3) | {Q1: 5}
    told = plan.modules[Q1].error
    small = adapter.squeeze(plan=plan)
    small.save(tmp_path / "out")
    row = next(row for row in small.report.rows if row.name == Q1)
    assert (row.rank_after, small.modules[Q1].rank) == (5, 5)
    assert row.discarded == pytest.approx(tail(dense(adapter, Q1), 5), rel=1e-5)
    assert told is not None and row.discarded / row.norm < told


def test_a_module_edited_to_rank_0_leaves(adapter: Adapter, tmp_path: Path) -> None:
    plan = edited(adapter, tmp_path / "plan.toml", (rf'^("{re.escape(V0)}" = {{ rank = )3', r"\g<1>0"), rank=3)
    assert adapter.squeeze(plan=plan).dropped == (V0,)


def test_a_plan_by_hand_may_be_short(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(f'format = 1\ndefault_rank = 2\n[modules]\n"{DOWN}" = 7\n')
    assert ranks(adapter.squeeze(plan=Plan.load(tmp_path / "plan.toml"))) == dict.fromkeys(SHAPES, 2) | {DOWN: 7}
    (tmp_path / "plan.json").write_text('{"format": 1, "default_rank": 99}')
    assert ranks(adapter.squeeze(plan=Plan.load(tmp_path / "plan.json"))) == dict.fromkeys(SHAPES, RANK)


def test_a_plan_fits_another_adapter_of_the_same_modules_with_enough_rank(adapter: Adapter, tmp_path: Path) -> None:
    plan = make_plan(adapter, params=900)
    top = max(plan.ranks.values())
    for rank in (top, top - 1):
        other = lora_squeeze.load(write_folder(tmp_path / "other", plain_tensors(rank=rank), plain_config(r=rank)))
        if rank == top:
            assert ranks(other.squeeze(plan=plan)) == plan.ranks
        else:
            with pytest.raises(LoraSqueezeError, match=f"rank {top} in the plan is above its source rank {rank}"):
                other.squeeze(plan=plan)


def test_another_file_than_the_plan_was_made_for_is_told(adapter: Adapter, tmp_path: Path) -> None:
    plan = make_plan(adapter, params=900)
    other = lora_squeeze.load(write_folder(tmp_path / "other", {k: 2 * t for k, t in plain_tensors().items()}))
    assert plan.note_for(adapter) is None and plan_of(plan.ranks).note_for(other) is None
    assert (plan.note_for(other) or "").startswith("the plan was made for another file")


@pytest.mark.parametrize(
    "dials",
    [
        {"rank": 10**330}, {"params": 10**330}, {"size": 10**330}, {"rank": 3, "min_rank": 2**63}, {"max_rank": 2**63},
        {"rank": 3, "multiple_of": 10**5000}, {"rank": 3, "ranks": (1, 2**63)},
    ],
    ids=["rank", "params", "size", "min_rank", "max_rank", "multiple_of", "ranks"],
)  # fmt: skip
def test_numbers_beyond_all_sense_are_refused(adapter: Adapter, dials: dict[str, Any]) -> None:
    name = list(dials)[-1]
    with pytest.raises(LoraSqueezeError, match=rf"{name} is too large: a number must be below 2\^63"):
        adapter.squeeze(**dials)


def test_a_rank_below_the_lowest_allowed_is_refused(adapter: Adapter) -> None:
    with pytest.raises(LoraSqueezeError, match="rank 4 is below min_rank 6; change one of them"):
        adapter.squeeze(rank=4, min_rank=6)


def test_one_rule_only(adapter: Adapter) -> None:
    plan = make_plan(adapter, rank=3)
    with pytest.raises(LoraSqueezeError, match="give one rule: a plan says every rank, leave out energy, min_rank"):
        adapter.squeeze(plan=plan, energy=0.9, min_rank=2)
    with pytest.raises(LoraSqueezeError, match=r"how small\? give one of .*, or a plan"):
        adapter.squeeze()


def test_an_impossible_budget_names_the_smallest_possible_which_works(adapter: Adapter) -> None:
    for dials in ({"params": 1, "min_rank": 2}, {"size": 1}, {"params": 1, "allocate": "uniform", "ranks": (4, 8)}):
        rule = next(iter(dials))
        with pytest.raises(LoraSqueezeError, match=r"the smallest possible is [\d,]+") as error:
            make_plan(adapter, **dials)
        found = re.search(r"smallest possible is ([\d,]+)", str(error.value))
        assert found
        least = int(found[1].replace(",", ""))
        make_plan(adapter, **{**dials, rule: least})
        with pytest.raises(LoraSqueezeError, match="too small"):
            make_plan(adapter, **{**dials, rule: least - 1})


# --- limits -----------------------------------------------------------------------------------------------------------


def test_one_rank_per_type(adapter: Adapter) -> None:
    """The budget is kept, and each type has the rank that its modules have together."""
    plan = make_plan(adapter, params=900, same_rank_per="type")
    assert plan.ranks[Q0] == plan.ranks[Q1]
    assert plan.ranks != make_plan(adapter, params=900).ranks
    assert plan.totals["parameters"] <= 900
    assert plan.modules[Q0].reason == "budget: energy per parameter, shared by all q_proj"
    needed = make_plan(adapter, energy=0.9).ranks
    together = make_plan(adapter, energy=0.9, same_rank_per="type").ranks
    assert together[Q0] == max(needed[Q0], needed[Q1]) and together[V0] == needed[V0]
    with pytest.raises(LoraSqueezeError, match="same_rank_per must be one of module, type, got 'layer'"):
        make_plan(adapter, rank=3, same_rank_per="layer")


def test_in_a_type_a_module_that_has_less_keeps_what_it_has(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors |= plain_tensors({Q1: SHAPES[Q1]}, rank=2)
    config = plain_config(rank_pattern={"layers.1.q_proj": 2})
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    plan = make_plan(adapter, rank=5, same_rank_per="type")
    assert plan.ranks == dict.fromkeys(SHAPES, 5) | {Q1: 2}
    assert plan.modules[Q1].reason == "kept: source rank"
    assert ranks(adapter.squeeze(plan=plan)) == plan.ranks


def test_a_server_s_ranks_are_kept_to_even_where_fewer_directions_exist(tmp_path: Path) -> None:
    shapes = {"q_proj": (24, 20), "v_proj": (2, 20)}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors(shapes), plain_config()))
    assert make_plan(adapter, rank=4).ranks == {"q_proj": 4, "v_proj": 2}
    plan = make_plan(adapter, rank=4, ranks=(4, 8))
    assert plan.ranks == {"q_proj": 4, "v_proj": 4}
    adapter.squeeze(plan=plan).save(tmp_path / "out")
    out = lora_squeeze.load(tmp_path / "out")
    assert ranks(out) == plan.ranks
    torch.testing.assert_close(dense(out, "v_proj"), dense(adapter, "v_proj"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dials", [{}, {"same_rank_per": "type"}, {"multiple_of": 3}], ids=str)
def test_ranks_beyond_the_directions_of_a_module_are_not_paid_for(tmp_path: Path, dials: dict[str, Any]) -> None:
    """A head of two classes costs more per direction than all else, and has two of them."""
    shapes = {"layers.0.q_proj": (24, 20), "layers.1.q_proj": (24, 20), "score": (2, 400)}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors(shapes), plain_config()))
    uniform = {rank: adapter.squeeze(rank=rank, **dials).parameters for rank in range(1, RANK + 1)}
    for rank, parameters in uniform.items():
        assert adapter.squeeze(rank=rank, allocate="global", **dials).parameters <= parameters
        assert adapter.squeeze(params=parameters, allocate="uniform", **dials).parameters == parameters
    assert make_plan(adapter, rank=4).modules["score"] == PlanRow(2, RANK, "all its directions", 0.0)


def test_a_number_alone_is_no_type(tmp_path: Path) -> None:
    shapes = {"0.attn.to_out.0": (24, 20), "0.ff.net.0": (24, 20), "1.attn.to_out.0": (24, 20)}
    config = plain_config(target_modules=["to_out.0", "net.0"])
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors(shapes), config))
    plan = make_plan(adapter, params=500, same_rank_per="type")
    first, other, second = plan.ranks.values()
    assert first == second != other
    reasons = [row.reason.rpartition("shared by ")[2] for row in plan.modules.values()]
    assert reasons[0] == reasons[2] == "all to_out.0"


@pytest.mark.parametrize(
    ("dials", "reasons"),
    [
        ({"rank": 3}, ["rank 3"]),
        ({"rank": RANK}, ["kept: source rank"]),
        ({"params": 1400}, ["budget: energy per parameter", "kept: source rank"]),
        ({"params": 900, "allocate": "uniform"}, ["budget: one rank for all"]),
        ({"rank": 3, "allocate": "global"}, ["budget of rank 3: energy per parameter"]),
        ({"energy": 0.9}, ["energy 0.9"]),
        ({"energy": 0.9, "allocate": "global"}, ["energy 0.9 over all, energy per parameter"]),
        ({"energy": 0.9, "allocate": "uniform"}, ["energy 0.9, one rank for all"]),
        ({"energy": 0.99, "max_rank": 2}, ["max_rank 2"]),
        ({"energy": 0.5, "min_rank": 5}, ["floor: min_rank 5"]),
        ({"energy": 0.9, "ranks": (6,)}, ["energy 0.9, one of the allowed ranks"]),
        ({"error": 0.3, "multiple_of": 5}, ["error 0.3, a multiple of 5"]),
    ],
    ids=str,
)
def test_reasons(adapter: Adapter, dials: dict[str, Any], reasons: list[str]) -> None:
    assert sorted({row.reason for row in make_plan(adapter, **dials).modules.values()}) == reasons


def test_a_module_that_is_not_worth_its_place_leaves_with_a_reason(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[f"{PREFIX}{V0}.lora_B.weight"] *= 1e-9
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    row = make_plan(adapter, params=900).modules[V0]
    assert row == PlanRow(0, RANK, "budget: energy per parameter, not worth its place", 1.0)


# --- modules that are bound -------------------------------------------------------------------------------------------

CONV, LEFT, RIGHT = "conv", "moe.experts.0.up_proj", "moe.experts.1.up_proj"


@pytest.fixture
def grouped(tmp_path: Path) -> Adapter:
    """A convolution in two groups, of file rank 8, beside a linear layer."""
    generator = torch.Generator().manual_seed(0)
    tensors = plain_tensors({"q_proj": (24, 20)})
    tensors[f"{PREFIX}{CONV}.lora_A.weight"] = torch.randn(8, 4, 3, 3, generator=generator)
    tensors[f"{PREFIX}{CONV}.lora_B.weight"] = torch.randn(12, 4, 1, 1, generator=generator)
    return lora_squeeze.load(write_folder(tmp_path / "grouped", tensors))


@pytest.fixture
def experts(tmp_path: Path) -> Adapter:
    """Modules that PEFT fuses when it loads them: all have one rank."""
    tensors = plain_tensors({LEFT: (24, 20), RIGHT: (24, 20)})
    return lora_squeeze.load(write_folder(tmp_path / "experts", tensors))


def plan_of(ranks: Mapping[str, int], **more: Any) -> Plan:
    return Plan({name: PlanRow(rank) for name, rank in ranks.items()}, **more)


def test_a_grouped_convolution_counts_its_groups(grouped: Adapter) -> None:
    plan = make_plan(grouped, rank=5)
    assert plan.ranks == {"q_proj": 5, CONV: 4}
    assert ranks(grouped.squeeze(plan=plan)) == plan.ranks
    assert make_plan(grouped, energy=0.01).modules[CONV].reason != "floor: the module cannot leave the adapter"
    rows = make_plan(grouped, params=200).modules
    assert rows[CONV].rank >= 2
    for rank, text in {
        3: "conv: rank 3 in the plan is no multiple of 2, the number of its groups",
        10: "conv: rank 10 in the plan is above its source rank 8",
        0: "conv: rank 0 in the plan is too low: it cannot leave the adapter, give it at least 2",
    }.items():
        with pytest.raises(LoraSqueezeError, match=text):
            grouped.squeeze(plan=plan_of({"q_proj": 5, CONV: rank}))
    assert ranks(grouped.squeeze(plan=plan_of({"q_proj": 5}, default_rank=1))) == {"q_proj": 5, CONV: 2}


def test_modules_that_must_share_a_rank_are_held_to_it(experts: Adapter) -> None:
    assert set(make_plan(experts, energy=0.9).ranks.values()) == {make_plan(experts, energy=0.9).ranks[LEFT]}
    with pytest.raises(
        LoraSqueezeError,
        match=f"{LEFT} has rank 3 in the plan and {RIGHT} has rank 4; these modules must share one rank .*fused",
    ):
        experts.squeeze(plan=plan_of({LEFT: 3, RIGHT: 4}))
    with pytest.raises(LoraSqueezeError, match="these modules must share one rank"):
        experts.squeeze(plan=plan_of({LEFT: 3}, default_rank=4))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers.9.q_proj": 3}, r"the plan has 'layers.9.q_proj', which the adapter has not; it has 'layers.0"),
        ({Q0: None}, r"the plan has no rank for 'layers.0.q_proj'; add a line for each, or default_rank"),
        ({V0: 9}, r"layers.0.v_proj: rank 9 in the plan is above its source rank 8; a squeeze cannot add rank"),
        (dict.fromkeys(SHAPES, 0), "the plan leaves no module in the adapter"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_by_name(adapter: Adapter, changes: dict[str, Any], text: str) -> None:
    wanted = {name: rank for name, rank in (dict.fromkeys(SHAPES, 3) | changes).items() if rank is not None}
    with pytest.raises(LoraSqueezeError, match=text):
        adapter.squeeze(plan=plan_of(wanted))
