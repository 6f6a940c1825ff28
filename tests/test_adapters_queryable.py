"""Queryable LoRA: how blocks are routed, what they may know of each other, and the plain LoRA of its mean."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import IN, METHODS, Net, adapted, drawn_from, layers, net, shake
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters.queryable_lora import QueryableDelta, fix_routes, instructed, routes
from lora_squeeze.methods.adapters.queryable_routing import ClearAtEntry, convex

QUERYABLE = METHODS["queryable"]
R, K, D, TEXT, ALPHA = 3, 4, 5, 6, 6
SCALE = ALPHA / R


def numbers(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 4) -> Tensor:
    return numbers(2, 5, IN, seed=seed)


def model_of(base: nn.Module | None = None, **settings: Any) -> Any:
    """A trained one on the tiny net, in float64, routed sharply enough to tell tokens apart."""
    model = adapted(QUERYABLE, base, **{"alpha": ALPHA, "init_weights": False, **settings})
    shake(model)
    model.double()
    if not deltas(model)[0].config.static:
        memory = deltas(model)[0].memory
        for parameter in (memory.keys, memory.of_state, memory.of_depth, memory.depth_value, memory.depth_query):
            parameter.data *= 3
    return model


def deltas(model: nn.Module, adapter: str = "default") -> list[QueryableDelta]:
    return [layer.deltas[adapter] for layer in layers(model).values()]


def by_hand(model: Any, x: Tensor, told: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """The net's output and the weights of each block, token by token from the definition."""
    config, memory = model.peft_config["default"], deltas(model)[0].memory
    states: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def route(block: int, h: Tensor) -> Tensor:
        found = torch.zeros(*h.shape[:-1], K, dtype=h.dtype)
        for b in range(h.shape[0]):
            for t in range(h.shape[1]):
                upto = {"causal": h[b, : t + 1], "token": h[b, t : t + 1], "mean": h[b]}[config.pool]
                states.setdefault(block, torch.zeros_like(h))
                states[block] = states[block].index_put((torch.tensor(b), torch.tensor(t)), upto.mean(0))
                u = states[block][b, t]
                normed = (u - u.mean()) / (u.var(correction=0) + 1e-5).sqrt()
                query = memory.of_state @ normed + memory.query_bias
                earlier = [memory.depth_value @ states[c][b, t] for c in range(block)]
                if earlier:
                    scores = torch.stack([memory.depth_query @ v / math.sqrt(D) for v in earlier]).exp()
                    query = query + memory.of_depth @ sum(
                        s * v for s, v in zip(scores / scores.sum(), earlier, strict=True)
                    )
                logits = memory.keys @ query / math.sqrt(D)
                if told is not None:
                    query = query + memory.of_text @ told[b]
                    prior = (memory.text_keys @ told[b] / config.temperature).exp()
                    logits = memory.keys @ query / math.sqrt(D) + config.prior * (prior / prior.sum()).log()
                kept = sorted(range(K), key=lambda j: -float(logits.detach()[j]))[: config.top_k]
                total = sum(logits[j].exp() for j in kept)
                for j in kept:
                    place = tuple(torch.tensor(i) for i in (b, t, j))
                    found = found.index_put(place, logits[j].exp() / total)
        return found

    def layer(number: int, x: Tensor) -> Tensor:
        delta, block = deltas(model)[number], number // config.block_layers
        h = x @ delta.A.T
        if number % config.block_layers == 0:
            weights[block] = route(block, h)
        core = torch.einsum("btk,kij->btij", weights[block], memory.atoms)
        base = list(layers(model).values())[number].get_base_layer()
        return base(x) + SCALE * torch.einsum("or,btri,bti->bto", delta.B, core, h)

    for pair in (0, 2):
        x = layer(pair + 1, torch.tanh(layer(pair, x)))
    head: nn.Module = model.base_model.model.head
    return head(x), weights


@pytest.mark.parametrize("pool", ["causal", "token", "mean"])
@pytest.mark.parametrize("block_layers", [1, 2, 3])
def test_it_is_routed_as_defined(pool: str, block_layers: int) -> None:
    model = model_of(pool=pool, block_layers=block_layers)
    wanted, weights = by_hand(model, tokens())
    torch.testing.assert_close(model(tokens()), wanted)
    for found, by_block in zip(routes(model), weights.values(), strict=True):
        torch.testing.assert_close(found, by_block.detach())
    assert len({tuple(row.nonzero().flatten().tolist()) for row in routes(model)[0].flatten(0, 1)}) > 1


def test_an_instruction_biases_it_as_defined() -> None:
    model = model_of(text_dim=TEXT, temperature=0.5)
    told = numbers(2, TEXT, seed=5)
    with instructed(model, told):
        found = model(tokens())
    torch.testing.assert_close(found, by_hand(model, tokens(), told)[0])
    torch.testing.assert_close(model(tokens()), by_hand(model, tokens())[0])
    with instructed(model, told[0]):
        same = model(tokens())
    torch.testing.assert_close(same, by_hand(model, tokens(), told[:1].expand(2, -1))[0])
    assert not torch.allclose(found, model(tokens()), rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"block_layers": 2}, {"text_dim": TEXT}], ids=str)
def test_gradients_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    model = model_of(**settings)
    told = numbers(2, TEXT, seed=5) if settings.get("text_dim") else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    upstream = numbers(2, 5, 3, seed=6)
    wanted = torch.autograd.grad((by_hand(model, tokens(), told)[0] * upstream).sum(), parameters)
    if told is None:
        found = torch.autograd.grad((model(tokens()) * upstream).sum(), parameters)
    else:
        with instructed(model, told):
            found = torch.autograd.grad((model(tokens()) * upstream).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_with_one_atom_it_is_a_plain_lora(tmp_path: Path) -> None:
    model = model_of(atoms=1)
    atom = deltas(model)[0].atoms[0]
    for layer in layers(model).values():
        delta = layer.deltas["default"]
        torch.testing.assert_close(layer.get_delta_weight("default"), SCALE * delta.B @ (atom @ delta.A))
        x = numbers(7, layer.in_features)
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + x @ layer.get_delta_weight("default").T)
        assert layer.supports_lora_conversion()
    wanted = model.float()(tokens().float())
    model.save_pretrained(tmp_path / "own")
    adapter = load(tmp_path / "own", base=net())
    assert {module.rank for module in adapter.modules.values()} == {R}
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(tokens().float()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(tokens().float()), wanted, rtol=1e-4, atol=1e-5)


def test_with_equal_atoms_routing_does_not_matter() -> None:
    model = model_of()
    deltas(model)[0].atoms.data[:] = torch.eye(R, dtype=torch.float64)
    wanted = net().double()
    for name, layer in layers(model).items():
        delta = layer.deltas["default"]
        wanted.get_submodule(name.removeprefix("base_model.model.")).weight.data += SCALE * delta.B @ delta.A
    torch.testing.assert_close(model(tokens()), wanted(tokens()))


def test_weights_are_convex_few_and_bound_the_norm_of_the_core() -> None:
    model = model_of(top_k=2)
    model(tokens())
    atoms = deltas(model)[0].atoms.detach()
    bound = max(float(torch.linalg.matrix_norm(atom, 2)) for atom in atoms)
    for weights in routes(model):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
        assert weights.min() >= 0
        assert ((weights != 0).sum(-1) == 2).all()
        cores = torch.einsum("btk,kij->btij", weights, atoms)
        assert torch.linalg.matrix_norm(cores, 2).max() <= bound + 1e-12


def test_top_k_counts_after_everything_is_added() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    torch.testing.assert_close(convex(logits, 2), torch.tensor([[0.0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0]]))
    model = model_of(text_dim=TEXT, top_k=2, prior=1e6)
    memory = deltas(model)[0].memory
    told = numbers(TEXT, seed=5)
    wanted = (memory.text_keys @ told).argmax()
    with instructed(model, told):
        model(tokens())
    for weights in routes(model):
        torch.testing.assert_close(weights, functional.one_hot(wanted, K).expand_as(weights).double())


def test_no_prior_and_one_that_prefers_nothing_are_the_same() -> None:
    model = model_of(text_dim=TEXT)
    found = {}
    for name in ("as-it-is", "uniform", "none"):
        if name == "uniform":
            deltas(model)[0].text_keys.data.zero_()
        for delta in deltas(model):
            delta.config.prior = 0.0 if name == "none" else 0.5
        with instructed(model, numbers(TEXT, seed=5)):
            found[name] = model(tokens())
    torch.testing.assert_close(found["uniform"], found["none"])
    assert not torch.allclose(found["uniform"], found["as-it-is"], rtol=1e-3)


@pytest.mark.parametrize("text", [0, TEXT])
def test_what_is_common_is_counted_and_stored_once(text: int) -> None:
    for block_layers in (1, 4):
        model = adapted(QUERYABLE, block_layers=block_layers, text_dim=text)
        layers_own = sum(R * (layer.in_features + layer.out_features) for layer in layers(model).values())
        common = K * R * R + K * D + 2 * D * R + D * D + 2 * D + text * (D + K)
        assert model.get_nb_trainable_parameters()[0] == layers_own + common
        assert sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values()) == layers_own + common


@torch.no_grad()
def test_later_blocks_know_of_earlier_ones_and_not_the_reverse() -> None:
    model = model_of()
    deltas(model)[0].memory.atoms[:] = torch.eye(R, dtype=torch.float64)  # so routing changes no output
    model(tokens())
    before = routes(model)
    for number, delta in enumerate(deltas(model)):
        delta.A *= -1  # another state of this block, and of no other: B follows
        delta.B *= -1
        model(tokens())
        delta.A *= -1
        delta.B *= -1
        same = [torch.allclose(one, other, atol=1e-9) for one, other in zip(routes(model), before, strict=True)]
        assert same == [block < number for block in range(4)]


@pytest.mark.parametrize("pool", ["causal", "token", "mean"])
def test_later_tokens_change_earlier_ones_with_the_mean_over_all_alone(pool: str) -> None:
    model = model_of(pool=pool)
    x = tokens()
    changed = torch.cat([x[:, :3], numbers(2, 2, IN, seed=8)], 1)
    same = torch.allclose(model(x)[:, :3], model(changed)[:, :3], rtol=1e-9)
    assert same == (pool != "mean")


def test_token_by_token_the_pool_of_tokens_gives_the_whole() -> None:
    """As a decoder with a cache calls it; the mean over earlier tokens would need them."""
    for pool, same in (("token", True), ("causal", False)):
        model = model_of(pool=pool)
        steps = torch.cat([model(tokens()[:, t : t + 1]) for t in range(5)], 1)
        assert torch.allclose(steps, model(tokens())) == same


def test_tokens_on_a_grid_are_tokens_in_a_row() -> None:
    model = model_of()
    flat = numbers(2, 6, IN)
    torch.testing.assert_close(model(flat.view(2, 2, 3, IN)).flatten(1, 2), model(flat))


def test_without_tokens_each_row_is_its_own() -> None:
    model = model_of()
    rows = numbers(7, IN)
    torch.testing.assert_close(model(rows), torch.cat([model(row[None]) for row in rows]))


def test_nothing_is_left_of_the_pass_before() -> None:
    model = model_of()
    wanted = model(tokens())
    others = [tokens(seed=9), numbers(3, 2, IN), numbers(4, IN)]
    for other in others:
        model(other)
        assert torch.equal(model(tokens()), wanted)
    list(layers(model).values())[2](numbers(2, 5, IN, seed=9))  # a layer by itself
    assert torch.equal(model(tokens()), wanted)
    model(tokens())
    assert len(routes(model)) == 4


def test_layers_of_a_block_that_see_other_tokens_are_routed_by_themselves() -> None:
    model = model_of(block_layers=4)
    first, second = list(layers(model).values())[:2]
    first(numbers(2, 5, IN))
    context = deltas(model)[0].context
    second(numbers(2, 5, 20))
    assert len(context.routes) == 1
    second(numbers(2, 3, 20))
    assert len(context.routes) == 2


class Checkpointed(Net):
    """Each block is computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        found: Tensor = self.head(x)
        return found


def checkpointed(*, reentrant: bool, **settings: Any) -> Any:
    with drawn_from(0):
        base = Checkpointed().eval()
    base.reentrant = reentrant
    return model_of(base, **settings)


@pytest.mark.parametrize("block_layers", [1, 2, 3])
def test_checkpointing_gives_the_same_gradients(block_layers: int) -> None:
    found = []
    for model in (model_of(block_layers=block_layers), checkpointed(reentrant=False, block_layers=block_layers)):
        for _ in range(2):
            model.zero_grad()
            model(tokens()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("block_layers", [1, 4])
def test_checkpointing_that_would_lose_gradients_is_refused(block_layers: int) -> None:
    model = checkpointed(reentrant=True, block_layers=block_layers)
    with pytest.raises(
        LoraSqueezeError, match=r"turn it on with gradient_checkpointing_kwargs=\{'use_reentrant': False"
    ):
        model(tokens().requires_grad_()).sum().backward()


@pytest.mark.parametrize("other", [tokens(seed=9), numbers(3, 2, IN)], ids=["values", "shape"])
def test_checkpointing_that_comes_back_to_an_older_pass_is_refused(other: Tensor) -> None:
    model = checkpointed(reentrant=False)
    loss = model(tokens()).sum() + model(other).sum()
    with pytest.raises(
        LoraSqueezeError, match=r"gradient checkpointing has come back to a forward pass that is not the"
    ):
        loss.backward()
    plain = model_of()
    (plain(tokens()).sum() + plain(other).sum()).backward()


def mean_cores(model: Any, batches: list[Tensor]) -> list[Tensor]:
    """Of each layer, over all tokens of all batches."""
    weights = [by_hand(model, x)[1] for x in batches]
    blocks = [torch.cat([each[block].flatten(0, -2) for each in weights]).mean(0) for block in weights[0]]
    n = model.peft_config["default"].block_layers
    atoms = deltas(model)[0].atoms
    return [torch.einsum("k,kij->ij", blocks[number // n], atoms).detach() for number in range(4)]


@pytest.mark.parametrize("block_layers", [1, 3])
def test_with_fixed_routes_it_is_the_lora_of_the_mean_core(block_layers: int, tmp_path: Path) -> None:
    model = model_of(block_layers=block_layers)
    batches = [tokens(), numbers(3, 4, IN, seed=7)]
    cores = mean_cores(model, batches)
    fix_routes(model, batches)
    for layer, core in zip(layers(model).values(), cores, strict=True):
        delta = layer.deltas["default"]
        wanted = SCALE * delta.B @ core @ delta.A
        torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-5, atol=1e-6)
        x = numbers(2, 3, layer.in_features)
        torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), x @ wanted.T, rtol=1e-5, atol=1e-5)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if "_delta" in name} == {"A", "B"}
    fix_routes(model, [])  # has nothing to do any more
    wanted = model.float()(tokens().float())
    model.save_pretrained(tmp_path / "own")
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path / "own", low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(again(tokens().float()), wanted)
    lora_squeeze.convert(load(tmp_path / "own", base=net()), "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(tokens().float()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(tokens().float()), wanted, rtol=1e-4, atol=1e-5)


def test_the_mean_leaves_out_what_the_mask_does() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    with drawn_from(0):
        model = model_of(Masked().eval(), pool="token")
    plain = model_of(pool="token")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    cores = mean_cores(plain, [torch.cat([tokens()[0], tokens()[1, :2]])[None]])
    model.train()
    model.base_model.model.head.eval()
    fix_routes(model, [{"x": tokens(), "attention_mask": mask}])
    assert model.training
    assert not model.base_model.model.head.training
    for delta, core in zip(deltas(model), cores, strict=True):
        torch.testing.assert_close(delta.core.double(), core, rtol=1e-6, atol=1e-6)


def test_routes_are_not_fixed_without_data_for_every_block() -> None:
    model = model_of()
    with pytest.raises(
        LoraSqueezeError, match=r"no batch reaches block 0 of the adapter 'default'; activate it and give"
    ):
        fix_routes(model, [])
    wanted = model(tokens())
    with pytest.raises(
        LoraSqueezeError, match=r"the model has no Queryable LoRA 'other'; make one with get_peft_model"
    ):
        fix_routes(model, [tokens()], adapter="other")
    assert torch.equal(model(tokens()), wanted)


def test_a_refused_merge_changes_nothing(tmp_path: Path) -> None:
    model = model_of().float()
    x = tokens().float()
    wanted = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for refused in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(
            LoraSqueezeError, match=r"blocks.0.wide: the update of a Queryable LoRA depends on the input"
        ):
            refused()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model(x), wanted)
    assert not any(layer.supports_lora_conversion() for layer in layers(model).values())
    model.save_pretrained(tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"put its mean over your data in its place first: .*fix_routes\(model"):
        load(tmp_path, base=net()).save(tmp_path / "lora")


def test_copies_have_routes_memory_and_entry_of_their_own() -> None:
    model = model_of()
    wanted = model(tokens())
    twin = copy.deepcopy(model)
    assert routes(twin) == []
    with torch.no_grad():
        deltas(twin)[0].memory.atoms *= 2
    other = twin(tokens())
    assert not torch.allclose(other, wanted)
    assert torch.equal(model(tokens()), wanted)
    twin(numbers(3, 2, IN))
    assert torch.equal(twin(tokens()), other)
    assert [delta.memory for delta in deltas(twin)] == [deltas(twin)[0]] * 4
    assert [weights.shape for weights in routes(twin)] == [(2, 5, K)] * 4


def test_the_base_that_is_unloaded_has_no_hook_left() -> None:
    model = model_of()
    base = model.base_model.model
    assert [type(hook) for hook in base._forward_pre_hooks.values()] == [ClearAtEntry]
    plain = model.unload()
    del model
    wanted = net().double()(tokens())
    assert torch.equal(plain(tokens()), wanted)
    assert not plain._forward_pre_hooks
    assert not plain._forward_pre_hooks_with_kwargs


def test_an_adapter_made_anew_under_the_name_of_a_deleted_one_begins_afresh() -> None:
    model = model_of()
    model.add_adapter("other", QUERYABLE.config())
    model.delete_adapter("other")
    model.add_adapter("other", QUERYABLE.config())
    model.set_adapter("other")
    assert [delta.layer for delta in deltas(model, "other")] == [0, 1, 2, 3]
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert {"atoms", "keys", "A", "B"} <= trained


def test_instructions_that_do_not_fit_are_refused() -> None:
    model = model_of(text_dim=TEXT)
    with (
        pytest.raises(LoraSqueezeError, match=r"takes instructions of text_dim 6, got one of \(7,\)"),
        instructed(model, numbers(7)),
    ):
        pass
    with (
        pytest.raises(
            LoraSqueezeError, match=r"the adapter 'default' takes instructions of text_dim 0, got one of \(6,"
        ),
        instructed(model_of(), numbers(6)),
    ):
        pass
    with (
        pytest.raises(LoraSqueezeError, match=r"wide: there are 3 instructions for a batch of 2; give one, or one for"),
        instructed(model, numbers(3, TEXT)),
    ):
        model(tokens())


def language_model(**settings: Any) -> Any:
    config = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    with drawn_from(0):
        base = GPT2LMHeadModel(config).eval()
        return adapted(QUERYABLE, base, trained=True, target_modules=["c_attn", "c_proj"], **settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_decoding_with_a_cache_is_refused_where_it_would_be_wrong() -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for pool in ("causal", "mean"):
        model = language_model(pool=pool)
        wanted = (
            rf'attn.c_attn: a Queryable LoRA with pool="{pool}" is routed by all tokens and cannot go on from a '
            r'cache of the earlier ones; give use_cache=False, train with pool="token", or put'
        )
        with pytest.raises(LoraSqueezeError, match=wanted):
            model.generate(input_ids=ids, **options)
        assert model.generate(input_ids=ids, use_cache=False, **options).shape == (1, 9)
        with model.disable_adapter():
            assert model.generate(input_ids=ids, **options).shape == (1, 9)
        fix_routes(model, [{"input_ids": ids}])
        assert model.generate(input_ids=ids, **options).shape == (1, 9)
    model = language_model(pool="token")
    found = [model.generate(input_ids=ids, use_cache=cached, **options) for cached in (False, True)]
    assert torch.equal(*found)


def test_what_it_refuses() -> None:
    for name in ("atoms", "query_dim", "block_layers"):
        with pytest.raises(ValueError, match=rf"{name} must be a whole number from 1, got 0"):
            QUERYABLE.config(**{name: 0})
    with pytest.raises(ValueError, match=r"r must be 2 or more, got 1"):
        QUERYABLE.config(r=1)
    for top_k in (1, 5):
        with pytest.raises(ValueError, match=rf"top_k must be from 2 to atoms, got {top_k} of 4"):
            QUERYABLE.config(top_k=top_k)
    with pytest.raises(ValueError, match=r"pool must be one of causal, token, mean, got 'max'"):
        QUERYABLE.config(pool="max")
    for name, value in (("text_dim", -1), ("prior", -1.0), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=r"text_dim and prior must be 0 or more and temperature above 0, got"):
            QUERYABLE.config(**{name: value})
