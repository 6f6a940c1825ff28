"""Our parameterisations in PEFT's own tests of tuners: tiny custom models, and tiny language models of three families.

By default each is asked once of every method, with both layers of the custom model and one language model;
`PEFT_SUITE=all` adds other targets, modules_to_save, and the other two families.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from peft_suite import Known, asked_of, suite
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

import lora_squeeze.methods.adapters
import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods)
from lora_squeeze.methods.catalogue import adapter_entries

ALL = os.environ.get("PEFT_SUITE") == "all"
HOME = tempfile.TemporaryDirectory(prefix="peft-suite-")  # goes with the process
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own warnings of PEFT's own models
SETTINGS: dict[str, dict[str, Any]] = {
    "nola": {"r": 2, "bases": 12},
    "blocklora": {"r": 2, "blocks": 2},
    "hydra": {"r": 2, "r_sequential": 2},
    "wara": {"r": 2},
    "queryable": {"r": 2, "atoms": 4, "top_k": 3, "query_dim": 5, "block_layers": 1, "pool": "token"},
    "tera": {},
    "loldu": {"r": 2},
    "svfit": {"r": 2},
    "loraxs": {"r": 2},
    "paca": {"r": 2},
    "snella": {"r": 4, "sparsity": 0.5},
    "lift": {"r": 2, "filter_rank": 2},
    "sara": {"fraction": 0.25},
    "randloraranks": {"r": 2, "together": 1},
    "projlora": {"r": 2, "length": 40},
    "dylora": {"r": 2},
    "matryoshka": {"r": 2},
    "sora": {"r": 2},
    "trp": {},
    "maestro": {"r": 2},
    "blora": {"r": 2},
    "diffora": {"r": 2},
}
TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": "lin0"},
    {"target_modules": ["lin1"], "modules_to_save": ["lin0"]},
]
_INPUT = "ends in a merge, and an update that depends on the input is not merged"
_RESTS = "the gates rest until the controller ends the warm-up"
KNOWN = (
    Known(r"test_disable_adapters(_with_merging)?", ("snella", "projlora"), "does not begin at the base's function"),
    Known(r"test_disable_adapters", ("loraxs",), "begins near the base's function, not at it"),
    Known(r".*merg.*|test_forward_b?float16.*", ("queryable",), _INPUT),
    Known(r"test_only_params_are_updated", ("queryable",), "the model has one earlier block to attend to"),
    Known(r"test_only_params_are_updated|test_training_.*", ("blora",), _RESTS),
    Known(r"test_parameters_after_loading_model", ("tera", "snella"), "diverges at the test's learning rate of 0.5"),
    Known(r"test_multiple_adapters_mixed_.*", ("projlora",), "the default vector is longer than such a model"),
    Known(r"test_training_decoders_layer_indexing", ("projlora",), "one vector for all layers, however few there are"),
    Known(r".*_gradient_checkpointing", ("queryable",), "the reentrant kind is refused", always=False),
)


def language_models() -> list[str]:
    """Folders of tiny random models; PEFT's tests know their families by the name."""
    sizes = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    models = {
        "LlamaForCausalLM": LlamaConfig(intermediate_size=64, num_key_value_heads=2, initializer_range=0.2, **sizes),
        "GPT2LMHeadModel": GPT2Config(initializer_range=0.2, **sizes),
        "OPTForCausalLM": OPTConfig(word_embed_proj_dim=16, ffn_dim=32, init_std=0.2, **sizes),
    }
    asked = list(models) if ALL else ["LlamaForCausalLM"]
    for name in asked:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(models[name]).save_pretrained(f"{HOME.name}/tiny-random-{name}")
    return [f"{HOME.name}/tiny-random-{name}" for name in asked]


def config_class(name: str) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]


CASES = [
    (f"{name} {number}", "MLP", config_class(name), {**settings, **targets})
    for name, settings in SETTINGS.items()
    for number, targets in enumerate(TARGETS if ALL else TARGETS[:1])
]
PAIRS = [
    (f"{name} {kind}", name, config_class(name),
     {**settings, "init_weights": False, "target_modules": ["lin0"]},
     {**settings, "init_weights": False, "target_modules": [second]})
    for name, settings in SETTINGS.items()
    for kind, second in (("same", "lin0"), ("different", "lin1"))
]  # fmt: skip


def test_every_method_is_asked() -> None:
    assert {name.upper() for name in SETTINGS} == set(adapter_entries())


custom, decoders = suite("test_custom_models"), suite("test_decoder_models")


@asked_of(
    {"test_name, model_id, config_cls, config_kwargs": CASES,
     "config_cls": [(config_class(name),) for name in SETTINGS]},
    KNOWN,
)  # fmt: skip
class TestCustomModels(custom.TestPeftCustomModel):
    """Layers of 10 x 20 and 20 x 2."""


@asked_of({"test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": PAIRS}, KNOWN)
class TestSeveralActive(custom.TestMultipleActiveAdapters):
    """Two adapters at once."""


@asked_of(
    {"model_id": [(path,) for path in language_models()],
     "config_cls,config_kwargs": [(config_class(name), {"task_type": "CAUSAL_LM", "target_modules": None, **settings})
                                  for name, settings in SETTINGS.items()]},
    KNOWN,
)  # fmt: skip
class TestDecoders(decoders.TestDecoderModels):
    """Language models with PEFT's default targets."""
