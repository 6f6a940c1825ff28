"""What is extracted from fine-tuned models of transformers, in PEFT."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_cases import (
    HEAD,
    TOKENS,
    extracted,
    integers,
    note_of,
    planted,
    with_tokens,
    write,
)
from torch import nn

from lora_squeeze.data_aware import TIED
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import to_peft
from lora_squeeze.formats.dense import extract


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=tied))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def tuned_from(model: nn.Module, which: str) -> None:
    """Add a rank-2 update to the weights whose names match."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if re.search(which, name) and weight.ndim == 2:
                weight += 0.02 * planted(*weight.shape, seed=i)


CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "llama": (llama, r"_proj\.weight", {}),
    "llama-vocabulary": (llama, r"(_proj|embed_tokens|lm_head)\.weight", {"vocabulary": "lora"}),
    "llama-tied": (lambda: llama(tied=True), r"(q_proj|embed_tokens)\.weight", {"vocabulary": "lora"}),
    "llama-tied-carry": (lambda: llama(tied=True), r"(q_proj|embed_tokens)\.weight", {"vocabulary": "carry"}),
    "gpt2": (gpt2, r"(c_attn|c_proj|c_fc)\.weight", {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_peft_makes_the_tuned_model_of_the_base(tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    build, which, options = CASES[case]
    model = build().eval()
    model.save_pretrained(tmp_path / "base")
    tuned_from(model, which)
    model.save_pretrained(tmp_path / "tuned")
    adapter = extract(tmp_path / "tuned", tmp_path / "base", max_rank=2, **options)
    to_peft.adopt(adapter).squeeze(rank=2).save(tmp_path / "lora")

    base = type(model).from_pretrained(tmp_path / "base").eval()
    tokens = torch.arange(10)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", "Model has? ?(with)? `tie_word_embeddings=True`")
        before, wanted = base(tokens).logits, model(tokens).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "lora"))(tokens).logits
    assert (before - wanted).norm() > 0.05 * wanted.norm(), "the planted update must tell"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_peft_makes_the_tuned_model_of_biases_too(tmp_path: Path) -> None:
    """Of layers with a module as biases of B, zeros for the others; of norms whole."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    model = gpt2().eval()
    model.save_pretrained(tmp_path / "base")
    tuned_from(model, r"(c_attn|c_fc)\.weight")
    with torch.no_grad():
        for i, (name, vector) in enumerate(model.named_parameters()):
            if re.search(r"0\.(attn\.c_attn|ln_1)\.", name) and vector.ndim == 1:
                vector += 0.1 * integers(*vector.shape, seed=i, bound=3)
    model.save_pretrained(tmp_path / "tuned")
    adapter = to_peft.adopt(extract(tmp_path / "tuned", tmp_path / "base", max_rank=2, carry=True))
    adapter.squeeze(rank=2).save(tmp_path / "lora")
    kinds = Counter(extra.kind for extra in adapter.extras.values())
    assert kinds == {"lora bias": 4, "module to save": 2} and all(m.floor == 1 for m in adapter.modules.values())

    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    tokens = torch.arange(10)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        wanted = model(tokens).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "lora"))(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_bias_of_b_is_refused_beside_the_update_of_an_embedding(tmp_path: Path) -> None:
    tuned, base, _ = with_tokens()
    base["model.layers.0.q.bias"] = integers(24, seed=6)
    tuned["model.layers.0.q.bias"] = base["model.layers.0.q.bias"] + 1
    adapter = extracted(tmp_path, tuned, base, vocabulary="lora", carry=True)
    with pytest.raises(LoraSqueezeError, match=r"beside the update of an embedding, model\.embed_tokens; leave it out"):
        to_peft.adopt(adapter)


@pytest.mark.parametrize("dial", [{"rank": 8}, {"energy": 0.8}, None], ids=str)
def test_modules_of_single_experts_have_the_rank_that_fusing_them_needs(
    tmp_path: Path, dial: dict[str, Any] | None
) -> None:
    from peft import PeftModel
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=3, vocab_size=40)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
                weight += 0.05 * torch.randn(weight.shape)
    model.save_pretrained(tmp_path / "tuned")
    adapter = to_peft.adopt(extract(tmp_path / "tuned", tmp_path / "base"))
    assert len({module.group for module in adapter.modules.values()}) == 1
    (adapter.squeeze(**dial) if dial else adapter).save(tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {} and settings["r"] <= 16

    base = MixtralForCausalLM.from_pretrained(tmp_path / "base").eval()
    tokens = torch.arange(10)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*gate_up_proj", RuntimeWarning)  # of a pattern that PEFT itself adds
        before, wanted = base(tokens).logits, model(tokens).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "lora"))(tokens).logits
    # The whole difference, or most of it: a rank below that of the matrices is no exact copy.
    assert (found - wanted).norm() < (0.7 if dial else 1e-4) * (before - wanted).norm()


def test_a_name_of_one_part_is_no_target_at_the_end_of_others(tmp_path: Path) -> None:
    from peft import PeftModel

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_out, self.block = nn.Linear(8, 8), nn.ModuleDict({"proj_out": nn.Linear(8, 8)})

    base = {"proj_out.weight": integers(8, 8, seed=1), "block.proj_out.weight": integers(8, 8, seed=2)}
    tuned = {**base, "proj_out.weight": base["proj_out.weight"] + planted(8, 8)}
    to_peft.adopt(extracted(tmp_path, tuned, base)).squeeze(rank=2).save(tmp_path / "lora")
    model = PeftModel.from_pretrained(Model(), str(tmp_path / "lora"))
    made = {name.partition(".lora_")[0] for name, _ in model.base_model.model.named_parameters() if "lora_" in name}
    assert made == {"proj_out"}


def test_a_tied_head_shares_the_factors_of_its_embedding(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    tuned_from(model, "embed_tokens")
    model.save_pretrained(tmp_path / "tuned")
    adapter = extract(tmp_path / "tuned", tmp_path / "base", max_rank=4, vocabulary="lora")
    embedding, head = (adapter.modules[name] for name in ("model.embed_tokens", "lm_head"))
    assert embedding.group == head.group == TIED and adapter.config["ensure_weight_tying"] is True
    assert (head.kind, head.out_features, head.in_features) == ("linear", 50, 32)
    one, other = adapter.source.updates([embedding, head])
    assert torch.equal(one.B, other.A.mT) and torch.equal(one.A, other.B.mT)


def test_a_carried_embedding_goes_into_the_file_as_the_tied_head_too(tmp_path: Path) -> None:
    """With its new rows; not where no configuration ties the two."""
    tuned, base, _ = with_tokens(48, 40)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    folders = [write(tmp_path / "tuned", tuned, config=config), write(tmp_path / "base", base, config=config)]
    adapter = extract(*folders, vocabulary="carry")
    assert {name: extra.name for name, extra in adapter.extras.items()} == {TOKENS: TOKENS, HEAD: HEAD}
    assert torch.equal(adapter.extra(HEAD), tuned[TOKENS])
    assert note_of(adapter, "tied to the embedding").startswith(f"{HEAD}: ")
    adopted = to_peft.adopt(adapter)
    assert adopted.config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    # Releases of transformers before 5 do not write a setting that is their default.
    for settings, keys in (({}, {TOKENS, HEAD}), ({"tie_word_embeddings": False}, {TOKENS})):
        (tmp_path / "base" / "config.json").write_text(json.dumps({"architectures": ["Some1LMHeadModel"], **settings}))
        assert set(extract(*folders, vocabulary="carry").extras) == keys


def test_a_head_that_the_tuning_has_untied_is_not_taken_for_its_embedding(tmp_path: Path) -> None:
    tuned, base, _ = with_tokens()
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    folders = [
        write(tmp_path / "tuned", tuned | {"lm_head.weight": integers(40, 20, seed=8)}, config=config),
        write(tmp_path / "base", base, config=config),
    ]
    adapter = extract(*folders, vocabulary="lora")
    assert "lm_head" not in adapter.modules and "ensure_weight_tying" not in adapter.config
    assert note_of(adapter, "only in the tuned model").startswith("lm_head.weight: ")


def test_layers_of_gpt2_are_known_to_be_stored_transposed(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    tuned_from(model, r"c_\w+\.weight")
    model.save_pretrained(tmp_path / "tuned")
    adapter = extract(tmp_path / "tuned", tmp_path / "base")
    square = adapter.modules["transformer.h.0.attn.c_proj"]
    assert adapter.config["fan_in_fan_out"] is True and square.layout.layer.turned
    attention = adapter.modules["transformer.h.0.attn.c_attn"]
    assert (attention.out_features, attention.in_features) == (96, 32)
