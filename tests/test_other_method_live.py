"""A live adapter of any method is squeezed in place: it becomes a plain LoRA and is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Method, adapted, batch, layers, net, shake
from peft import LoHaConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from peft_models import seeded
from torch import Tensor, nn
from training_cases import Counting, model, small_llama
from transformers import Trainer, TrainingArguments

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.callback import ControllerCallback
from lora_squeeze.methods.control import controller_for
from lora_squeeze.schedule import make_schedule
from lora_squeeze.training.callback import SqueezeCallback
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.squeezer import Squeezer

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
STATIC = [method for method in METHODS.values() if method.static]
PEFTS_OWN = ["VERA", "LOHA", "LOKR", "ADALORA", "VBLORA", "RANDLORA", "UNILORA", "OFT", "SHIRA", "FOURIERFT"]
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "total_step": 10}, "VBLORA": {"vector_length": 4, "num_vectors": 16, "topk": 2},
    "UNILORA": {"theta_d_length": 64}, "OFT": {"r": 0, "oft_block_size": 4}, "RANDLORA": {"r": 3, "randlora_alpha": 6},
    "SHIRA": {"r": 1}, "FOURIERFT": {"n_frequency": 6}, "VERA": {"r": 3, "init_weights": False},
}  # fmt: skip


def ids(of: list[Method]) -> list[str]:
    return [method.name for method in of]


def changes(model: nn.Module) -> dict[str, Tensor]:
    """dW of every layer, in the layout (out, in)."""
    return {name.split("base_model.model.")[-1]: m.get_delta_weight("default") for name, m in layers(model).items()}


def optimal(dW: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(dW.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape")  # PEFT, of lora_bias
@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer of type Linear has no bias")
@pytest.mark.parametrize("method", STATIC, ids=ids(STATIC))
def test_the_best_directions_of_every_method_become_a_lora(method: Method, tmp_path: Path) -> None:
    live = adapted(method, trained=True)
    with torch.no_grad():
        whole, wanted = live(batch()), {name: optimal(dW, 2) for name, dW in changes(live).items()}
        lost = sum(float((dW - wanted[name]).square().sum()) for name, dW in changes(live).items())
        total = sum(float(dW.square().sum()) for dW in changes(live).values())
    done = squeeze_(live, 2)
    assert live.peft_config["default"].peft_type == PeftType.LORA
    assert done.energy == pytest.approx(1 - lost / total, abs=1e-5)
    assert done.parameters_after == sum(p.numel() for name, p in live.named_parameters() if ".lora_" in name) - (
        sum(p.numel() for name, p in live.named_parameters() if name.endswith("lora_B.default.bias"))
    )
    for name, layer in layers(live).items():
        found = layer.get_delta_weight("default")
        torch.testing.assert_close(found.double(), wanted[name.split("base_model.model.")[-1]], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        small = live(batch())
        live.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(net(), tmp_path).eval()
        torch.testing.assert_close(again(batch()), small, rtol=1e-5, atol=1e-5)
    assert lora_squeeze.load(tmp_path).rank == 2
    assert small.shape == whole.shape


@pytest.mark.parametrize("method", [m for m in STATIC if m.rank], ids=ids([m for m in STATIC if m.rank]))
def test_at_its_own_rank_the_function_stays(method: Method) -> None:
    live = adapted(method, trained=True)
    with torch.no_grad():
        wanted = live(batch())
        squeeze_(live, max(layer.deltas["default"].rank for layer in layers(live).values()))
        torch.testing.assert_close(live(batch()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's SHiRA
@pytest.mark.parametrize("kind", PEFTS_OWN)
def test_methods_of_peft_become_one_too(kind: str) -> None:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        live = get_peft_model(net(), made(target_modules=["wide", "tall"], **OPTIONS.get(kind, {}))).eval()
        for name, p in live.named_parameters():
            if p.requires_grad and "indices" not in name:
                p.data += 0.1 * torch.randn_like(p)
    with torch.no_grad():
        wanted = live(batch())
        squeeze_(live, energy=1.0)
        torch.testing.assert_close(live(batch()), wanted, rtol=1e-3, atol=1e-4)
    assert {type(m).__name__ for m in layers(live).values()} == {"Linear"}
    assert {p.requires_grad for name, p in live.named_parameters() if "lora_" in name} == {True}


def test_energy_and_budgets_choose_ranks_by_layer() -> None:
    live = adapted(METHODS["nola"], trained=True, r=6)
    spectra = {name: torch.linalg.svdvals(dW.double()).square() for name, dW in changes(live).items()}
    done = squeeze_(live, energy=0.9)
    for name, spectrum in spectra.items():
        share = spectrum.cumsum(0) / spectrum.sum()
        assert done.ranks[name] == int((share < 0.9).sum()) + 1
    budget = adapted(METHODS["nola"], trained=True, r=6)
    assert squeeze_(budget, params=300, allocate="global").parameters_after <= 300


@pytest.mark.parametrize("name", ["nola", "sora", "projlora", "hydra", "trp"])
def test_the_optimiser_goes_on_with_the_factors(name: str) -> None:
    live = adapted(METHODS[name], modules_to_save=["head"]).train()
    head = [p for n, p in live.named_parameters() if "modules_to_save" in n]
    theirs = [p for n, p in live.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-3}, {"params": theirs, "lr": 1e-2}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(3):
        _step(live, optimizer, scheduler)
    squeeze_(live, 2, optimizer=optimizer)
    factors = [p for n, p in live.named_parameters() if "lora_" in n]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in factors}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in head]
    assert set(optimizer.state) == set(head)
    assert all(p.requires_grad for p in (*factors, *head))
    before = [p.detach().clone() for p in factors]
    loss = _step(live, optimizer, scheduler)
    for _ in range(10):
        last = _step(live, optimizer, scheduler)
    assert last < loss
    assert all(not torch.equal(p, old) for p, old in zip(factors, before, strict=True) if p.any())
    assert live.peft_config["default"].modules_to_save == ["head"]


def _step(live: Any, optimizer: Any, scheduler: Any) -> float:
    loss = (live(batch()) - 1).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.item()


def controlled_steps(count: int, live: Any, optimizer: Any, controller: Any, squeezer: Squeezer) -> None:
    """A loop with a method's controller and a squeezer."""
    for _ in range(count):
        controller.before_forward()
        (live(batch()) - 1).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        squeezer.step()


def test_the_controller_ends_where_the_lora_begins() -> None:
    live = adapted(METHODS["sora"], times_lr=True).train()
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
    controller = controller_for(live, 10, optimizer)
    squeezer = Squeezer(live, optimizer, make_schedule(3, 1, 10, mode="cont", last_steps=4))
    controlled_steps(10, live, optimizer, controller, squeezer)
    controller.finish()
    squeezer.finish()
    assert controller.steps_done == 6
    assert [(entry["step"], entry["rank"]) for entry in squeezer.history] == [(6, 1)]
    assert lora_ranks(live) == {1}


def lora_ranks(live: nn.Module) -> set[int]:
    return {m.r["default"] for m in live.modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


def llama(name: str, **settings: Any) -> Any:
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": TaskType.CAUSAL_LM}
    return adapted(METHODS[name], seeded(small_llama), **{**targets, **settings}).train()


@pytest.mark.parametrize("mode", ["in", "cont", "post"])
@pytest.mark.parametrize("name", ["nola", "lift", "dylora", "blora"])
def test_the_callback_squeezes_every_method(name: str, mode: str, tmp_path: Path) -> None:
    network = llama(name, r=8)
    callback = SqueezeCallback(2, mode=mode, **({"last_steps": 4} if mode == "cont" else {}))
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": []}
    args = TrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=100, seed=1,
        **settings,
    )  # fmt: skip
    run = Trainer(network, args, train_dataset=Counting(), callbacks=[callback, ControllerCallback()])
    run.train()
    assert lora_ranks(network) == {2}
    assert callback.history[-1]["rank"] == 2
    assert (len(callback.history) > 1) == (mode == "in")
    run.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(seeded(small_llama), str(tmp_path / "final"))
    tokens = torch.arange(3, 11)[None]
    torch.testing.assert_close(again(tokens).logits, network.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_beyond_the_change_is_a_lora(tmp_path: Path) -> None:
    def run(network: Any, **more: Any) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
            use_cpu=True, save_strategy="steps", save_steps=10, logging_steps=100, seed=1, learning_rate=1e-2,
        )  # fmt: skip
        callback = SqueezeCallback(2, mode="cont", last_steps=4)
        trainer = Trainer(network, args, train_dataset=Counting(), callbacks=[callback])
        trainer.train(**more)
        return network

    whole = run(llama("nola", r=8))
    checkpoint = str(tmp_path / "checkpoint-10")
    with pytest.raises(LoraSqueezeError, match=r"in this checkpoint the adapter 'default' is a LoRA already; make the"):
        run(llama("nola", r=8), resume_from_checkpoint=checkpoint)
    lora = PeftModel.from_pretrained(seeded(small_llama), checkpoint, is_trainable=True)
    resumed = run(lora, resume_from_checkpoint=checkpoint)
    for (key, found), wanted in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), key


@pytest.mark.parametrize("mode", ["cont", "post"])
@pytest.mark.parametrize("name", ["sora", "loha"])
def test_a_checkpoint_before_the_change_is_one_of_the_method(name: str, mode: str, tmp_path: Path) -> None:
    def run(folder: str, **more: Any) -> Any:
        if name == "loha":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
                network: Any = get_peft_model(seeded(small_llama), config).train()
        else:
            network = llama(name, r=8)
        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="steps", save_steps=3, logging_steps=100, seed=1, learning_rate=1e-2,
        )  # fmt: skip
        callback = SqueezeCallback(2, mode=mode, **({"last_steps": 2} if mode == "cont" else {}))
        callbacks = [callback] if name == "loha" else [ControllerCallback(), callback]
        Trainer(network, args, train_dataset=Counting(), callbacks=callbacks).train(**more)
        assert lora_ranks(network) == {2}
        return network

    whole = run("whole")
    resumed = run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (key, found), wanted in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), key


def test_what_cannot_be_is_refused_and_nothing_changes() -> None:
    live = adapted(METHODS["nola"], trained=True)
    before = {name: p.clone() for name, p in live.named_parameters()}
    for how, words in (
        ({"rank": 9}, "rank 9 is above the present rank 3; a squeeze only goes down"),
        ({"rank": 2, "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)}, "does not hold"),
    ):
        with pytest.raises(LoraSqueezeError, match=words):
            squeeze_(live, **how)
    live.add_adapter("other", METHODS["nola"].config())
    with pytest.raises(LoraSqueezeError, match="'default' is of NOLA and cannot become a LoRA beside other adapters"):
        squeeze_(live, 2, adapter="default")
    live.delete_adapter("other")
    live.merge_adapter()
    with pytest.raises(LoraSqueezeError, match="adapters are merged into the base weights; call unmerge_adapter"):
        squeeze_(live, 2)
    live.unmerge_adapter()
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)
    with pytest.raises(LoraSqueezeError, match="'default' is of QUERYABLE, whose update depends on the input"):
        squeeze_(adapted(METHODS["queryable"]), 2)
    with pytest.raises(LoraSqueezeError, match="statistics of the data are those of LoRA layers"):
        Squeezer(live, None, make_schedule(3, 2, 10), data_aware=True)


def test_a_plain_lora_goes_its_own_way() -> None:
    live = model()
    assert isinstance(live.peft_config["default"], LoraConfig)
    shake(live)
    assert squeeze_(live, 2).maps


@pytest.mark.parametrize("closed", [2, 3])
def test_a_layer_without_any_update_becomes_a_pair_of_zeros(closed: int) -> None:
    live = adapted(METHODS["sora"], trained=True)
    first = next(iter(layers(live).values()))
    with torch.no_grad():
        first.deltas["default"].gate[:closed] = 0
        wanted = live(batch())
        squeeze_(live, 3)
        torch.testing.assert_close(live(batch()), wanted, rtol=1e-4, atol=1e-4)
    assert lora_ranks(live) == {3, max(1, 3 - closed)}


def test_ranks_found_below_the_schedules_are_no_fault() -> None:
    live = adapted(METHODS["sora"], trained=True)
    squeezer = Squeezer(live, None, make_schedule(3, 2, 4, mode="post"))
    with torch.no_grad():
        for layer in layers(live).values():
            layer.deltas["default"].gate[1:] = 0
        wanted = live(batch())
        squeezer.finish()
        torch.testing.assert_close(live(batch()), wanted, rtol=1e-4, atol=1e-4)
    assert lora_ranks(live) == {1}


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_a_schedule_begins_at_the_width_of_pruned_updates(form: str) -> None:
    """Their rank is 1 while they are zero."""
    config = METHODS["trp"].config(form=form, r=4)
    live = get_peft_model(net(), config)
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
    controller = controller_for(live, 8, optimizer)
    squeezer = Squeezer(live, optimizer, make_schedule(4, 2, 8, mode="cont", last_steps=4))
    controlled_steps(8, live, optimizer, controller, squeezer)
    squeezer.finish()
    assert lora_ranks(live) == {2}


def test_a_refused_squeeze_leaves_the_controller_at_work() -> None:
    live = adapted(METHODS["dylora"], trained=True)
    controller = controller_for(live, 5)
    with pytest.raises(LoraSqueezeError, match="rank 9 is above the present rank 3; a squeeze only goes down"):
        squeeze_(live, 9)
    assert not controller.over
    squeeze_(live, 2)
    assert controller.over
