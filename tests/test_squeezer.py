"""Squeezer: a schedule carried out in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import CASES
from peft_models import adapted, outputs, reload, save
from training_cases import SOURCE, STEPS, TARGET, adamw, batch, in_squeeze, model, train, trained_parameters, widths

from lora_squeeze import LoraSqueezeError
from lora_squeeze.adaptive import Adaptive
from lora_squeeze.schedule import Schedule, make_schedule
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.squeezer import Squeezer


def test_ranks_follow_the_schedule() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, Schedule((8, 4, 2), (3, 4, 5)))
    seen = []
    for step in range(12):
        train(network, optimizer, squeezer, [step])
        seen.append(squeezer.rank)
    assert seen == [8] * 2 + [4] * 4 + [2] * 6
    assert [(e["step"], e["rank"]) for e in squeezer.history] == [(3, 4), (7, 2)]
    assert squeezer.finish() is None


def test_post_squeeze_comes_after_the_last_step() -> None:
    network, plain = model(), model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, make_schedule(SOURCE, TARGET, 5, mode="post"))
    losses = train(network, optimizer, squeezer, range(5))
    assert widths(network) == {TARGET}
    assert losses == train(plain, adamw(plain), None, range(5)), "until then, training is as without a squeeze"


def test_learning_goes_on_across_squeezes() -> None:
    """In every stage the loss falls below what the squeeze left, and no squeeze undoes all that was learnt."""
    network = model()
    optimizer = adamw(network, lr=0.05)
    probe = batch(999)
    squeezer = Squeezer(network, optimizer, in_squeeze(60), loss=lambda: network(**probe).loss)
    losses = train(network, optimizer, squeezer, [999] * 60)
    ends = [losses[39], losses[59]]
    for entry, end in zip(squeezer.history, ends, strict=True):
        assert entry["loss_before"] <= entry["loss_after"] < losses[0]
        assert end < entry["loss_after"]


def test_full_rank_squeeze_leaves_the_loss_alone() -> None:
    network = model()
    optimizer = adamw(network)
    train(network, optimizer, None, range(3))
    probe = batch(999)
    squeezer = Squeezer(network, optimizer, Adaptive(TARGET, 10, energy=1.0), loss=lambda: network(**probe).loss)
    # Rank 2 everywhere by construction, so that the squeeze to the budget at the deadline loses nothing.
    with torch.no_grad():
        for module in live_modules(network, "default"):
            module.B[:, TARGET:] = 0
    train(network, optimizer, None, [])
    squeezer.steps_done = 7
    squeezer.step()
    (entry,) = squeezer.history
    assert entry["loss_after"] == pytest.approx(entry["loss_before"], abs=1e-6)


def test_stopping_early_still_ends_at_the_target() -> None:
    for network in (model(), model(lora_dropout=0.1)):
        optimizer = adamw(network)
        squeezer = Squeezer(network, optimizer, in_squeeze())
        train(network, optimizer, squeezer, range(5))
        assert widths(network) == {4}
        assert squeezer.finish() is not None
        assert widths(network) == {TARGET}
        assert network.peft_config["default"].r == TARGET


@pytest.mark.parametrize("way", ["replace", "mask"])
@pytest.mark.parametrize("data_aware", [False, True])
def test_masked_training_is_the_same(way: str, data_aware: bool) -> None:
    network = model().double()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze(), in_place=way, data_aware=data_aware)
    losses = train(network, optimizer, squeezer, range(STEPS))
    squeezer.finish()
    reference = model().double()
    other = adamw(reference)
    expected = train(reference, other, Squeezer(reference, other, in_squeeze(), data_aware=data_aware), range(STEPS))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert widths(network) == {TARGET}


def test_global_allocation_spends_the_same_parameters() -> None:
    network, uniform = model(), model()
    optimizer, other = adamw(network), adamw(uniform)
    squeezer = Squeezer(network, optimizer, in_squeeze(), allocate="global")
    reference = Squeezer(uniform, other, in_squeeze())
    train(network, optimizer, squeezer, range(STEPS))
    train(uniform, other, reference, range(STEPS))
    assert any(e["lowest_rank"] < e["rank"] for e in squeezer.history), "ranks differ"
    for mine, theirs in zip(squeezer.history, reference.history, strict=True):
        assert mine["parameters_after"] <= theirs["parameters_after"]
    assert squeezer.finish() is None


@pytest.mark.parametrize(
    "name",
    [
        "conv1d of gpt2", "convolutions", "grouped convolution", "embedding", "attention module", "experts",
        "patterns", "rslora and patterns", "lora bias", "modules to save", "tied embedding and head", "negative alpha",
    ],
)  # fmt: skip
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_all_kinds_of_layers_are_trained_on(name: str, allocate: Any, tmp_path: Path) -> None:
    case = CASES[name]
    network = adapted(case).train()
    source = max(m.width * m.step for m in live_modules(network, "default"))
    optimizer = adamw(network, lr=1e-3)
    schedule = make_schedule(source, case.rank, 9)
    squeezer = Squeezer(network, optimizer, schedule, allocate=allocate, data_aware=True)
    losses = []
    for _ in range(9):
        found = network(case.batch())
        loss = (found if isinstance(found, torch.Tensor) else found.logits).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
        losses.append(loss.item())
    squeezer.finish()
    assert losses[-1] < losses[0]
    used = sum(m.cost * m.width for m in live_modules(network, "default"))
    assert used <= squeezer.budgets[-1]
    again = reload(case, save(network, tmp_path / "a"))
    assert torch.allclose(outputs(network.eval().double(), case), outputs(again, case), atol=1e-6)


def test_adaptive_reaches_the_budget_by_the_deadline() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, Adaptive(TARGET, 20, energy=0.99, every=2))
    uniform = sum(m.cost * TARGET for m in live_modules(network, "default"))
    train(network, optimizer, squeezer, range(20))
    used = sum(m.cost * m.width for m in live_modules(network, "default"))
    assert used <= uniform
    assert squeezer.history[-1]["step"] <= 16
    before_deadline = [e for e in squeezer.history if e["step"] < 16]
    assert all(e["energy"] >= 0.99 - 1e-6 for e in before_deadline)


def test_adaptive_by_predicted_loss_learns_from_the_measured_one() -> None:
    """The prediction is multiplied by the worst ratio of measured to predicted so far, at least 1."""
    network = model()
    optimizer = adamw(network, lr=0.05)
    probe = batch(999)
    squeezer = Squeezer(
        network, optimizer, Adaptive(TARGET, 40, loss=0.02, every=5), loss=lambda: network(**probe).loss
    )
    train(network, optimizer, squeezer, [999] * 40)
    used = sum(m.cost * m.width for m in live_modules(network, "default"))
    assert used <= squeezer.budgets[-1]
    worst = 1.0
    for entry in squeezer.history:
        assert entry["loss_predicted"] >= 0
        if entry["step"] < 32:  # before the deadline
            assert worst * entry["loss_predicted"] <= 0.02 + 1e-6
        worst = max(worst, (entry["loss_after"] - entry["loss_before"]) / entry["loss_predicted"])
    assert squeezer._correction() == pytest.approx(worst)


@pytest.mark.parametrize(("rests", "told"), [(3, [5]), (20, [16])])
def test_adaptive_by_predicted_loss_waits_for_the_first_gradients(rests: int, told: list[int]) -> None:
    """While B is zero nothing is known of the loss; at the deadline the ranks are then uniform."""
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, Adaptive(TARGET, 20, loss=100.0, every=1))
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.0 if step < rests else 1e-2
        train(network, optimizer, squeezer, [step])
    assert [entry["step"] for entry in squeezer.history][:1] == told
    assert sum(m.cost * m.width for m in live_modules(network, "default")) <= squeezer.budgets[-1]
    assert (widths(network) == {TARGET}) == (rests == 20)


class Seldom(torch.nn.Module):
    """A layer that sees every batch, and one that sees none without pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.picture = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, picture: torch.Tensor | None = None) -> torch.Tensor:
        h: torch.Tensor = self.text(x)
        return h if picture is None else h + self.picture(picture)


@pytest.mark.parametrize("arrives", [9, 20])
def test_adaptive_by_predicted_loss_waits_for_layers_that_the_data_have_not_reached(arrives: int) -> None:
    """If none come until the deadline, after 16 steps, energy decides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=SOURCE, target_modules=["text", "picture"], init_lora_weights=False)
        network = get_peft_model(Seldom(), config)
        x = torch.randn(32, 16)
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, Adaptive(TARGET, 20, loss=100.0, every=1))
    for step in range(20):
        network(x, x if step >= arrives else None).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
    assert [entry["step"] for entry in squeezer.history] == [min(arrives + 1, 16)]
    assert sum(m.cost * m.width for m in live_modules(network, "default")) <= squeezer.budgets[-1]


@pytest.mark.parametrize("name", ["experts", "attention module"])
def test_a_bound_on_the_loss_of_layers_without_statistics_is_refused(name: str) -> None:
    network = adapted(CASES[name]).train()
    with pytest.raises(
        LoraSqueezeError, match=r"the loss increase cannot be predicted for this layer; bound the energy"
    ):
        Squeezer(network, adamw(network), Adaptive(1, 20, loss=0.1))


def test_gradient_accumulation_and_clipping_go_through_a_squeeze() -> None:
    """Two half batches per step are the whole batch, before and after squeezes."""
    runs = []
    for parts in (1, 2):
        network = model().double()
        optimizer = adamw(network)
        squeezer = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
        losses = []
        for step in range(STEPS):
            whole, total = batch(step), 0.0
            for part in range(parts):
                rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
                loss = network(**{key: value[rows] for key, value in whole.items()}).loss / parts
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            squeezer.step()
            losses.append(total)
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_accelerates_wrappers_are_understood() -> None:
    from accelerate import Accelerator

    network = model()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(network, adamw(network))
    squeezer = Squeezer(prepared, optimizer, in_squeeze())
    for step in range(STEPS):
        accelerator.backward(prepared(**batch(step)).loss)
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
    assert widths(network) == {TARGET}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trained_parameters(network)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    runs = []
    for checkpointing in (False, True):
        network = model()
        if checkpointing:
            network.enable_input_require_grads()
            network.activation_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = adamw(network)
        squeezer = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
        runs.append(train(network, optimizer, squeezer, range(STEPS)))
        assert widths(network) == {TARGET}
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_scaled_loss_leaves_the_statistics_alone() -> None:
    """A scaler that changes its scale on the way weighs all steps alike."""
    found = []
    for scaled in (False, True):
        network = model()
        optimizer = adamw(network)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        squeezer = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
        for step in range(6):
            scaler.scale(network(**batch(step)).loss).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            squeezer.step(scale)
        assert squeezer.statistics is not None
        found.append(squeezer.statistics.moments())
    for path, moments in found[0].items():
        assert torch.allclose(found[1][path].F, moments.F, rtol=1e-3, atol=1e-3 * float(moments.F.abs().max()))


def test_a_squeeze_is_not_under_autocast() -> None:
    networks = [model(), model()]
    for network, inside in zip(networks, (False, True), strict=True):
        optimizer = adamw(network)
        squeezer = Squeezer(network, optimizer, Adaptive(TARGET, 20, loss=100.0, every=4), in_place="mask")
        train(network, optimizer, squeezer, range(3))
        train(network, optimizer, None, [3])
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            assert squeezer.step() is not None
            squeezer.finish()
        assert squeezer.statistics is not None
        network.told = (squeezer.history[0]["loss_predicted"], squeezer.statistics.moments(), optimizer.state_dict())
    (one, moments, optimizer), (other, others, twin) = (network.told for network in networks)
    assert one == other and moments.keys() == others.keys()
    for path, item in moments.items():
        assert torch.equal(item.C, others[path].C) and torch.equal(item.F, others[path].F)
    for key, state in optimizer["state"].items():
        assert all(torch.equal(value, twin["state"][key][name]) for name, value in state.items())
    for key, value in networks[0].state_dict().items():
        assert torch.equal(value, networks[1].state_dict()[key]), key


def test_autocast_to_bfloat16_trains_on() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(network, optimizer, squeezer, range(STEPS))
    assert losses[-1] < losses[0]
    assert {m.A.dtype for m in live_modules(network, "default")} == {torch.float32}


@pytest.mark.parametrize("way", ["replace", "mask"])
def test_compiled_models_are_squeezed(way: str) -> None:
    """A compiled graph notices parameters of another shape; kept shapes need no second compilation."""
    torch.compiler.reset()
    network = model()
    reference = model()
    optimizer, other = adamw(network), adamw(reference)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend)
    squeezer = Squeezer(compiled, optimizer, in_squeeze(), in_place=way)
    losses = train(compiled, optimizer, squeezer, range(3))
    first = len(graphs)
    losses += train(compiled, optimizer, squeezer, range(3, STEPS))
    expected = train(reference, other, Squeezer(reference, other, in_squeeze()), range(STEPS))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert (len(graphs) == first) == (way == "mask")
    squeezer.finish()
    assert widths(network) == {TARGET}


def test_several_adapters_are_squeezed_on_their_own_schedules() -> None:
    network = model()
    network.add_adapter("second", LoraConfig(r=6, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    network.base_model.set_adapter(["default", "second"])
    optimizer = adamw(network)
    with pytest.raises(LoraSqueezeError, match=r"several adapters are trained: default, second; name one"):
        Squeezer(network, optimizer, in_squeeze())
    first = Squeezer(network, optimizer, in_squeeze(), adapter="default")
    second = Squeezer(network, optimizer, make_schedule(6, 3, STEPS), adapter="second")
    for step in range(STEPS):
        train(network, optimizer, first, [step])
        second.step()
    assert widths(network) == {TARGET}
    assert {m.width for m in live_modules(network, "second")} == {3}


@pytest.mark.parametrize("turns", ["adapters", "factors"])
def test_what_is_trained_in_turn_goes_on_after_a_squeeze(turns: str) -> None:
    """At a squeeze, whatever has no turn is frozen; the optimiser holds it all the same."""
    network = model()
    names = ["default"]
    if turns == "adapters":
        network.add_adapter("second", LoraConfig(r=SOURCE, lora_alpha=SOURCE, target_modules=["q_proj"]))
        names.append("second")
    factors = [p for key, p in network.named_parameters() if "lora_" in key]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    squeezers = {name: Squeezer(network, optimizer, in_squeeze(), adapter=name) for name in names}
    for step in range(STEPS):
        turn = step % 2
        if turns == "adapters":
            network.set_adapter(names[turn])
        else:
            for key, p in network.named_parameters():
                p.requires_grad_(f"lora_{'BA'[turn]}" in key)
        live = [m for name in names for m in live_modules(network, name)]
        moving = [p for m in live for p in (m.A, m.B) if p.requires_grad]
        before = [p.detach().clone() for p in moving]
        train(network, optimizer, None, [step])
        assert not any(map(torch.equal, before, moving)), f"step {step + 1}"
        for squeezer in squeezers.values():
            squeezer.step()
    assert all({m.width for m in live_modules(network, name)} == {TARGET} for name in names)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for key, p in network.named_parameters() if "lora_" in key}


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (
            Schedule((16, 8), (5, 5)),
            {},
            r"begins at rank 16, but the adapter has rank 8; train it with LoraConfig\(r=16",
        ),
        (Adaptive(9, 10), {}, r"target rank 9 is above the adapter's rank 8"),
        (
            Schedule((8, 2), (5, 5)),
            {"learning_rate": "cosine"},
            r"learning_rate must be one of continue, restart, rank, restart-rank, got",
        ),
        (Schedule((8, 2), (5, 5)), {"learning_rate": "restart"}, r"needs a LambdaLR scheduler, got NoneType"),
        (Adaptive(2, 10), {"learning_rate": "restart"}, r"an adaptive schedule has none"),
        (Adaptive(2, 10), {"learning_rate": "rank"}, r"learning_rate='rank' needs .* an adaptive schedule has none"),
        (Schedule((8, 2), (5, 5)), {"learning_rate": "rank"}, r"'rank' needs a LambdaLR scheduler, got NoneType"),
        (Schedule((8, 2), (5, 5)), {"allocate": "each"}, r"allocate must be one of uniform, global, got 'each'"),
        (Schedule((8, 2), (5, 5)), {"optimizer_state": "x"}, r"optimizer_state must be one of transport, reset"),
        (Schedule((8, 2), (5, 5)), {"in_place": "x"}, r"in_place must be one of auto, replace, mask"),
        (Schedule((8, 2), (5, 5)), {"adapter": "x"}, r"no adapter 'x' in the model"),
    ],
)
def test_bad_requests_are_refused_before_the_first_step(schedule: Any, options: dict[str, Any], message: str) -> None:
    network = model()
    with pytest.raises(LoraSqueezeError, match=message):
        Squeezer(network, adamw(network), schedule, **options)


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(LoraSqueezeError, match=r"does not hold"):
        Squeezer(model(), adamw(model()), in_squeeze())
