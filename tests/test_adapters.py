"""What PEFT asks of a tuner, asked of every parameterisation: the model for this list is PEFT's own suite of tuners."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import HIDDEN, IN, METHODS, Inside, Method, adapted, batch, drawn_from, layers, net, shake
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import parameter_groups

pytestmark = [
    pytest.mark.parametrize("method", METHODS.values(), ids=METHODS),
    # A method that moves biases becomes a LoRA with biases, and not all layers of the tiny net have one.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2g}, allowed {tolerance:g}"


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def as_plain_lora(adapter: Adapter, method: Method) -> Adapter:
    """Without loss; an update of full rank is larger than the weight as a LoRA, which has to be asked for."""
    return lora_squeeze.convert(adapter, "peft", rank=adapter.rank if method.rank is None else None)


def of_the_weight(test: Callable[..., None]) -> Callable[..., None]:
    """A claim about an update that is the same for all inputs; where it is not, asking for it must be refused."""

    @functools.wraps(test)
    def asked(method: Method, **fixtures: Any) -> None:
        if method.static:
            return test(method, **fixtures)
        with pytest.raises(LoraSqueezeError, match=r"the update of a .* depends on the input, token by token"):
            test(method, **fixtures)

    return asked


def test_a_fresh_adapter_leaves_the_function_as_it_is(method: Method) -> None:
    if method.identity is None:
        pytest.skip("the method begins elsewhere, as its module says")
    base = net()(batch())
    for mode in (True, False):
        close(adapted(method).train(mode)(batch()), base, method.identity or 1e-30)


def test_trained_numbers_move_the_function(method: Method) -> None:
    assert (adapted(method, trained=True)(batch()) - net()(batch())).abs().max() > 1e-3


def test_without_its_usual_start_a_fresh_adapter_does_something(method: Method) -> None:
    assert (adapted(method, init_weights=False)(batch()) - net()(batch())).abs().max() > 1e-6


@of_the_weight
def test_the_layers_add_their_update_to_the_weight(method: Method) -> None:
    model = adapted(method, trained=True)
    by_hand = net()
    for name, layer in layers(model).items():
        target = by_hand.get_submodule(name.removeprefix("base_model.model."))
        delta = next(iter(layer.deltas.values()))
        target.weight.data += layer.get_delta_weight("default").detach()
        if delta.bias() is not None:
            target.bias.data += delta.bias().detach()
    close(model(batch()), by_hand(batch()), 2e-5)


@of_the_weight
def test_gradients_are_those_of_the_formed_update(method: Method) -> None:
    torch.manual_seed(0)
    for layer in layers(adapted(method, trained=True).double()).values():
        delta: Any = next(iter(layer.deltas.values()))
        if delta.dtype != torch.float64:
            pytest.skip("the method computes in float32")
        x = torch.randn(7, layer.in_features, dtype=torch.float64)
        upstream = torch.randn(7, layer.out_features, dtype=torch.float64)
        base = layer.get_base_layer()
        waits = method.waits or "nothing"
        parameters = [p for name, p in delta.named_parameters() if p.requires_grad and not name.startswith(waits)]
        parameters = parameters or [delta.vector]  # one of all layers
        bias = base.bias if delta.bias() is None else base.bias + delta.bias()
        formed = functional.linear(x, base.weight + delta.weight(), bias)
        wanted = torch.autograd.grad((formed * upstream).sum(), parameters)
        found = torch.autograd.grad((layer(x) * upstream).sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            close(one, other, 1e-6)


@of_the_weight
def test_gradients_reach_the_input(method: Method) -> None:
    layer = next(iter(layers(adapted(method, trained=True).double()).values()))
    x = torch.randn(5, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    upstream = torch.ones(5, layer.out_features, dtype=torch.float64)
    (found,) = torch.autograd.grad((layer(x) * upstream).sum(), x)
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    close(found, (upstream @ weight.double()).detach(), 1e-5)


@of_the_weight
def test_merging_keeps_the_function_and_unmerging_the_weight(method: Method) -> None:
    model = adapted(method, trained=True)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    wanted = model(batch())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        close(model(batch()), wanted, 2e-5)
        model.unmerge_adapter()
        for name, layer in layers(model).items():
            close(layer.get_base_layer().weight, before[name], 1e-6)
        close(model(batch()), wanted, 2e-5)


@of_the_weight
def test_merged_and_unloaded_it_is_a_plain_model(method: Method) -> None:
    model = adapted(method, trained=True)
    wanted = model(batch())
    plain = model.merge_and_unload(safe_merge=True)
    assert {type(m) for m in plain.modules()} == {type(m) for m in net().modules()}
    close(plain(batch()), wanted, 2e-5)


def test_unloading_gives_the_base_back(method: Method) -> None:
    plain = adapted(method, trained=True).unload()
    for (name, found), wanted in zip(plain.state_dict().items(), net().state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_safe_merge_refuses_what_is_no_number(method: Method) -> None:
    if not method.static:
        pytest.skip("no merge at all, see the others")
    model = adapted(method)
    layer = next(iter(layers(model).values()))
    parameter = next(p for p in next(iter(layer.deltas.values())).parameters())
    parameter.data.fill_(float("nan"))
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low-cpu-mem"])
def test_what_is_saved_is_what_is_loaded(method: Method, low_memory: bool, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    saved(model, tmp_path)
    with drawn_from(99):  # nothing may depend on the global generator
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(again(batch()), model(batch()))
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(f".{method.name}_delta." in key and ".default" not in key for key in keys)


@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low-cpu-mem"])
def test_it_may_be_loaded_under_other_names(method: Method, low_memory: bool, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    saved(model, tmp_path)
    mapping = {r"^(blocks|head)": r"inner.\1"}
    again = PeftModel.from_pretrained(Inside(), tmp_path, key_mapping=mapping, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(again(batch()), model(batch()))
    saved(again, tmp_path / "again")
    back = PeftModel.from_pretrained(net(), tmp_path / "again", key_mapping={r"^inner\.": ""}).eval()
    assert torch.equal(back(batch()), model(batch()))


def test_a_loaded_adapter_is_frozen_or_trained_as_asked(method: Method, tmp_path: Path) -> None:
    saved(adapted(method), tmp_path)
    frozen = PeftModel.from_pretrained(net(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == adapted(method).get_nb_trainable_parameters()[0]


def test_the_configuration_goes_through_its_file(method: Method, tmp_path: Path) -> None:
    config = method.config(
        seed=5, dropout=0.25, layers_to_transform=[1], layers_pattern="blocks", modules_to_save=["head"]
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.name.upper()


def test_the_count_of_trained_numbers(method: Method) -> None:
    model = adapted(method)
    layers_own = 2 * (method.count(IN, HIDDEN) + method.count(HIDDEN, IN))
    assert model.get_nb_trainable_parameters()[0] == layers_own + method.once
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(f".{method.name}_delta.default." in name for name in trained)


def test_training_moves_every_trained_number_and_nothing_else(method: Method) -> None:
    model = adapted(method).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = functional.mse_loss(model(batch()), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        waits = method.waits is not None and f".{method.waits}" in name
        assert torch.equal(parameter, before[name]) != (parameter.requires_grad and not waits), name


def test_disabled_the_base_speaks(method: Method) -> None:
    model = adapted(method, trained=True)
    wanted = model(batch())
    with model.disable_adapter():
        assert torch.equal(model(batch()), net()(batch()))
    assert torch.equal(model(batch()), wanted)


def test_two_adapters_side_by_side(method: Method, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    one = model(batch())
    saved(model, tmp_path)
    model.add_adapter("other", method.config(seed=7))
    assert torch.equal(model(batch()), one)
    shake(model, "other", seed=8)
    model.set_adapter("other")
    other = model.eval()(batch())
    assert not torch.allclose(other, one, atol=1e-4)
    active = [name for name, p in model.named_parameters() if p.requires_grad]
    assert active
    assert all("_delta.other." in name for name in active)
    model.set_adapter("default")
    assert torch.equal(model(batch()), one)
    model.load_adapter(str(tmp_path), "third")
    model.set_adapter("third")
    assert torch.equal(model(batch()), one)
    model.set_adapter("other")
    model.delete_adapter("third")
    assert torch.equal(model(batch()), other)


@of_the_weight
def test_an_adapter_made_beside_a_merged_one_is_the_same_as_beside_none(method: Method) -> None:
    model, other = adapted(method, trained=True), adapted(method, trained=True)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"), drawn_from(7):  # by PEFT, once it is there
        model.add_adapter("second", method.config())
    with drawn_from(7):
        other.add_adapter("second", method.config())
    states = [get_peft_model_state_dict(each, adapter_name="second") for each in (model, other)]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-6), name


@of_the_weight
def test_active_together_their_updates_add_up(method: Method) -> None:
    model = adapted(method, trained=True)
    model.add_adapter("other", method.config(seed=7))
    shake(model, "other", seed=8)
    model.base_model.set_adapter(["default", "other"])
    by_hand = net()
    for name, layer in layers(model).items():
        target = by_hand.get_submodule(name.removeprefix("base_model.model."))
        for adapter, delta in layer.deltas.items():
            target.weight.data += layer.get_delta_weight(adapter).detach()
            if delta.bias() is not None:
                target.bias.data += delta.bias().detach()
    wanted = by_hand(batch())
    close(model.eval()(batch()), wanted, 2e-5)
    model.merge_adapter()
    close(model(batch()), wanted, 2e-5)
    model.unmerge_adapter()
    close(model(batch()), wanted, 2e-5)


@of_the_weight
def test_the_rank_of_the_update_is_bounded(method: Method) -> None:
    for layer in layers(adapted(method, trained=True).double()).values():
        rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default").double(), rtol=1e-6))
        full = min(layer.in_features, layer.out_features)
        bound = full if method.rank is None else min(full, method.rank(layer.in_features, layer.out_features))
        delta: Any = next(iter(layer.deltas.values()))
        assert rank <= bound
        assert (delta.rank or full) == bound if method.rank else delta.rank is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision(method: Method, dtype: torch.dtype) -> None:
    """PEFT keeps the trained numbers in float32 beside a base of half precision, unless it is told not to."""
    wanted = adapted(method, trained=True)(batch())
    model = adapted(method, net(dtype), trained=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = model(batch(dtype))
    assert found.dtype == dtype
    close(found.float(), wanted, 0.1)
    cast = adapted(method, net(dtype), options={"autocast_adapter_dtype": False})
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {dtype}
    assert cast(batch(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(method, trained=True)(batch()).isfinite().all()


def test_a_model_that_is_cast_and_cast_back_keeps_its_frozen_numbers(method: Method) -> None:
    model = adapted(method)
    wanted = {name: b.clone() for name, b in model.named_buffers()}
    model.to(torch.bfloat16).to(torch.float32)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, wanted[name]), name


def test_dropout_acts_while_training_only(method: Method) -> None:
    model = adapted(method, trained=True, dropout=0.5)
    assert torch.equal(model(batch()), model(batch()))
    model.train()
    with drawn_from(1):
        assert not torch.equal(model(batch()), model(batch()))


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["wide"], 2), (r"blocks\.1\.(wide|tall)", 2), ("all-linear", 5), (["blocks.0.tall"], 1)],
    ids=["names", "expression", "all-linear", "path"],
)
def test_targets_are_asked_for_as_in_peft(method: Method, targets: Any, count: int) -> None:
    assert len(layers(adapted(method, target_modules=targets))) == count


@pytest.mark.parametrize("first", ["all-linear", ["blocks.0.tall"]])
def test_all_linear_layers_are_taken_beside_another_adapter_too(method: Method, first: Any) -> None:
    model = adapted(method, target_modules=first)
    model.add_adapter("second", method.config(target_modules="all-linear"))
    assert sum("second" in layer.deltas for layer in layers(model).values()) == 5


def test_layers_can_be_chosen_and_modules_excluded(method: Method) -> None:
    chosen = adapted(method, layers_to_transform=[1], layers_pattern="blocks")
    assert {name.split("blocks.")[1] for name in layers(chosen)} == {"1.wide", "1.tall"}
    rest = adapted(method, exclude_modules=["tall"])
    assert all(name.endswith("wide") for name in layers(rest))


def test_a_new_head_is_trained_and_stored(method: Method, tmp_path: Path) -> None:
    model = adapted(method, modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["default"].weight.data += 1
    saved(model, tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))
    assert not torch.allclose(again(batch()), net()(batch()))


def test_only_linear_layers_are_taken(method: Method) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv1d(3, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.wide(x)
            return found

    with pytest.raises(TypeError, match=r"wide: .* adapts nn.Linear and Conv1D, found Conv1d; leave it out"):
        get_peft_model(Convolution(), method.config(target_modules=["wide"]))


def test_gpt2_whose_weights_stand_transposed(method: Method, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def base() -> nn.Module:
        with drawn_from(0):
            return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=8)).eval()

    ids = torch.arange(8)[None]
    model = adapted(method, base(), trained=True, target_modules=["c_attn", "c_fc"])
    wanted = model(ids).logits
    saved(model, tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(ids).logits, wanted)
    if not method.static:
        return
    close(model.merge_and_unload()(ids).logits, wanted, 2e-5)
    as_plain_lora(load(tmp_path, base=base()), method).save(tmp_path / "lora")
    close(PeftModel.from_pretrained(base(), tmp_path / "lora").eval()(ids).logits, wanted, 1e-4)


@of_the_weight
def test_converted_it_is_a_plain_lora_of_the_same_function(method: Method, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    wanted = model(batch())
    saved(model, tmp_path / "method")
    adapter = load(tmp_path / "method", base=net())
    as_plain_lora(adapter, method).save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    close(plain(batch()), wanted, 1e-4)
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        full = min(layer.in_features, layer.out_features)
        bound = full if method.rank is None else min(full, method.rank(layer.in_features, layer.out_features))
        assert module.rank == bound


@of_the_weight
def test_converted_beside_a_base_of_half_precision_it_keeps_its_own(method: Method, tmp_path: Path) -> None:
    model = adapted(method, net(torch.bfloat16), trained=True)
    saved(model, tmp_path)
    adapter = load(tmp_path, base=net(torch.bfloat16))
    for name, layer in layers(model).items():
        wanted = copy.deepcopy(layer).double().get_delta_weight("default").detach()
        found = adapter.update(name.removeprefix("base_model.model."))
        close(found.scale * found.B.double() @ found.A.double(), wanted, 1e-5)


@of_the_weight
def test_squeezed_it_keeps_the_best_directions(method: Method, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    saved(model, tmp_path / "method")
    adapter = load(tmp_path / "method", base=net())
    lora_squeeze.convert(adapter, "peft", rank=2).save(tmp_path / "small")
    small = PeftModel.from_pretrained(net(), tmp_path / "small").eval()
    for name, layer in layers(model).items():
        update = layer.get_delta_weight("default").detach().double()
        rest = update - small.get_submodule(name).get_delta_weight("default").double()
        S = torch.linalg.svdvals(update)
        assert abs(rest.norm() - S[2:].norm()) <= 1e-4 * S.norm()


def test_the_state_has_no_frozen_numbers_that_a_seed_gives_again(method: Method) -> None:
    state = get_peft_model_state_dict(adapted(method))
    numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    assert numbers == 2 * (method.count(IN, HIDDEN) + method.count(HIDDEN, IN)) + method.once


def test_the_groups_of_an_optimiser_have_every_trained_number_once(method: Method) -> None:
    model = adapted(method, modules_to_save=["head"])
    first, *others = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert (first["lr"], first["weight_decay"]) == (1e-3, 0.1)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = [id(p) for group in (first, *others) for p in group["params"]]
    assert sorted(found) == sorted(trained)
    assert all(group["params"] for group in (first, *others))
    own = {trained[id(p)].rpartition(".")[2] for group in others for p in group["params"]}
    gates = {"sora": {"gate"}, "diffora": {"a"}, "blora": {"q_ranks"}}
    gates["blora"] |= {f"q_{kind}_{factor}" for factor in "AEB" for kind in ("bits", "range")}
    assert own == gates.get(method.name, set())
