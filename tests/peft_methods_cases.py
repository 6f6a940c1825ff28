"""A model and an adapter for every method of PEFT with an update of weights, and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft_cases import (
    Convolutions,
    Embedded,
    biased_llama,
    classifier,
    gpt2,
    llama,
    numbers,
    tied_llama,
    tokens,
)
from peft_models import randomise, save, seeded
from torch import Tensor, nn

from lora_squeeze.adapter import Adapter
from lora_squeeze.formats import peft_methods

Q = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Method:
    """An adapter to be made.

    Args:
        config: makes its configuration.
        base: builds the same base model on every call.
        batch: input of the model.
        known: the file alone tells the update.
        needs: a package that PEFT asks for.
        prepare: changes the adapted model after its adapter is randomised.
    """

    config: Callable[[], PeftConfig]
    base: Callable[[], nn.Module] = llama
    batch: Callable[[], Tensor] = tokens
    known: bool = False
    needs: str = ""
    prepare: Callable[[PeftModel], None] | None = None


@dataclass(frozen=True)
class Made:
    """An adapter as PEFT saved it, and the models around it."""

    method: Method
    folder: Path

    @cached_property
    def base(self) -> nn.Module:
        """The base model."""
        return seeded(self.method.base)

    @cached_property
    def adapter(self) -> Adapter:
        """What is read of it, with the base model where it is needed."""
        return peft_methods.load(self.folder, base=None if self.method.known else self.base)

    @cached_property
    def logits(self) -> Tensor:
        """What the adapted model gives."""
        return outputs(on_base(self.method, self.folder), self.method)

    @cached_property
    def merged(self) -> nn.Module:
        """The base model with the adapter merged by PEFT."""
        with quiet():
            return on_base(self.method, self.folder).merge_and_unload(safe_merge=True)

    def delta(self, name: str) -> Tensor:
        """Merged weight - base weight of one module, as PEFT's layer has them, in float64."""
        weights = [model.get_submodule(name).weight.detach().double() for model in (self.merged, self.base)]
        return weights[0] - weights[1]


class quiet(warnings.catch_warnings):
    """PEFT's remarks about settings are not the subject here; the random state stays as it was."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def made(method: Method, folder: Path) -> Made:
    """Make the adapter: random numbers in all that is trained."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(2)
        model = get_peft_model(seeded(method.base), method.config())
        randomise(model, 0.3)
        if method.prepare:
            method.prepare(model)
        save(model.eval(), folder)
    return Made(method, folder)


def on_base(method: Method, folder: Path) -> PeftModel:
    """The adapter in a folder on a fresh base model."""
    with quiet(), torch.random.fork_rng():
        return PeftModel.from_pretrained(seeded(method.base), str(folder)).eval()


def outputs(model: nn.Module, method: Method) -> Tensor:
    """Logits, or what the model gives."""
    with torch.no_grad():
        found = model(method.batch())
    return found if isinstance(found, Tensor) else found.logits


def trained_biases() -> nn.Module:
    """A Llama with biases that are not zero."""
    model = biased_llama()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    return model


def _prune(model: PeftModel) -> None:
    """AdaLoRA after its budget is spent: some of the ranks are masked, and left out on saving."""
    config = model.peft_config["default"]
    config.rank_pattern = {}
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            keep = torch.arange(len(parameter)) != len(config.rank_pattern) % len(parameter)
            parameter.data[~keep] = 0
            config.rank_pattern[name.removeprefix("base_model.model.")] = keep.tolist()


def _lora(**variant: Any) -> Callable[[], PeftConfig]:
    return lambda: peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": Q} | variant)


METHODS: dict[str, Method] = {
    # The file alone tells.
    "AdaLoRA": Method(
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=Q), known=True
    ),
    "AdaLoRA, pruned": Method(
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=Q),
        known=True,
        prepare=_prune,
    ),
    "LoHa": Method(lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=Q), known=True),
    "LoHa, high rank": Method(lambda: peft.LoHaConfig(r=5, alpha=6, target_modules=Q), known=True),
    "LoHa, patterns": Method(
        lambda: peft.LoHaConfig(
            r=2, alpha=6, target_modules=Q, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5}
        ),
        known=True,
    ),
    "LoHa, trained head": Method(
        lambda: peft.LoHaConfig(r=2, target_modules=Q, modules_to_save=["score"], task_type="SEQ_CLS"),
        base=classifier,
        known=True,
    ),
    "LoKr": Method(
        lambda: peft.LoKrConfig(
            r=2, alpha=6, target_modules=Q, rank_pattern={"v_proj": 1}, alpha_pattern={"v_proj": 5}
        ),
        known=True,
    ),
    "LoKr, two whole": Method(lambda: peft.LoKrConfig(r=16, alpha=6, target_modules=Q), known=True),
    "LoKr, both in factors": Method(
        lambda: peft.LoKrConfig(r=1, alpha=6, decompose_both=True, target_modules=Q), known=True
    ),
    "VB-LoRA": Method(
        lambda: peft.VBLoRAConfig(r=2, num_vectors=10, vector_length=8, topk=3, target_modules=Q), known=True
    ),
    "VB-LoRA, saved in short": Method(
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=10, vector_length=8, topk=3, target_modules=Q, save_only_topk_weights=True
        ),
        known=True,
    ),
    "Uni-LoRA, saved indices": Method(
        lambda: peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=Q, save_indices=True), known=True
    ),
    "DeLoRA": Method(lambda: peft.DeloraConfig(r=2, target_modules=Q), known=True),
    "GraLoRA": Method(lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=Q), known=True),
    "GraLoRA, hybrid": Method(
        lambda: peft.GraloraConfig(r=2, alpha=6, gralora_k=2, hybrid_r=1, target_modules=Q), known=True
    ),
    "C3A": Method(lambda: peft.C3AConfig(block_size=4, target_modules=Q), known=True),
    # With the base model.
    "Uni-LoRA": Method(lambda: peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=Q)),
    "VeRA": Method(lambda: peft.VeraConfig(r=4, target_modules=Q)),
    "VeRA, projections not saved": Method(
        lambda: peft.VeraConfig(r=4, target_modules=[*Q, "down_proj"], save_projection=False)
    ),
    "PVeRA": Method(lambda: peft.PveraConfig(r=4, target_modules=Q)),
    "TinyLoRA": Method(lambda: peft.TinyLoraConfig(r=2, u=4, target_modules=Q)),
    "MiSS": Method(lambda: peft.MissConfig(r=3, target_modules=Q)),
    "MiSS, mini": Method(lambda: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=Q)),
    "MiSS, bat": Method(lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=Q)),
    "HRA": Method(lambda: peft.HRAConfig(r=4, target_modules=Q)),
    "PSOFT": Method(lambda: peft.PsoftConfig(r=4, target_modules=Q)),
    "DEFT": Method(lambda: peft.DeftConfig(r=2, target_modules=Q)),
    "PEANuT": Method(lambda: peft.PeanutConfig(r=2, depth=1, target_modules=Q)),
    "AdaMSS": Method(
        lambda: peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, target_modules=Q),
        base=trained_biases,
        needs="sklearn",
    ),
    "OSF": Method(lambda: peft.OSFConfig(effective_rank=13, target_modules=["q_proj"])),
    "FourierFT": Method(lambda: peft.FourierFTConfig(n_frequency=3, target_modules=Q)),
    "WaveFT": Method(lambda: peft.WaveFTConfig(n_frequency=3, target_modules=Q)),
    "Supertuning": Method(lambda: peft.SupertuningConfig(sparsity=0.99, r=1, lora_alpha=2, target_modules=["q_proj"])),
    "Trainable tokens": Method(
        lambda: peft.TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=["embed_tokens"])
    ),
    "Trainable tokens, tied": Method(
        lambda: peft.TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=["embed_tokens"]), base=tied_llama
    ),
    "RandLoRA": Method(lambda: peft.RandLoraConfig(r=4, target_modules=Q)),
    "SHiRA": Method(lambda: peft.ShiraConfig(r=2, target_modules=Q)),
    "OFT": Method(lambda: peft.OFTConfig(oft_block_size=4, target_modules=Q)),
    "BOFT": Method(lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=Q)),
    "BOFT, trained biases": Method(
        lambda: peft.BOFTConfig(boft_block_size=4, bias="boft_only", target_modules=Q), base=trained_biases
    ),
    "RoAd": Method(lambda: peft.RoadConfig(variant="road_4", group_size=4, target_modules=Q)),
    "RoAd, some biases": Method(
        lambda: peft.RoadConfig(variant="road_1", group_size=4, target_modules=["q_proj", "lm_head"]),
        base=trained_biases,
    ),
    "IA3": Method(lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "IA3, biases": Method(
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        base=trained_biases,
    ),
    "HiRA": Method(lambda: peft.HiraConfig(r=2, target_modules=Q)),
    "GLoRA": Method(lambda: peft.GloraConfig(r=2, target_modules=Q), base=trained_biases),
    "FRoD": Method(lambda: peft.FrodConfig(target_modules=Q)),
    # Other kinds of layers.
    "LoHa, convolutions": Method(
        lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=["line", "plane", "point"], use_effective_conv2d=True),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "AdaLoRA, convolutions": Method(
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["plane", "point"]
        ),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "LoKr, convolutions": Method(
        lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=["line", "plane", "point"]),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "OFT, point-wise convolution": Method(
        lambda: peft.OFTConfig(oft_block_size=3, target_modules=["point"]),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "BOFT, convolution": Method(
        lambda: peft.BOFTConfig(boft_block_size=6, target_modules=["square"]),
        base=lambda: Square(),
        batch=numbers(2, 6, 5, 5),
    ),
    "HRA, convolution": Method(
        lambda: peft.HRAConfig(r=2, target_modules=["square"]), base=lambda: Square(), batch=numbers(2, 6, 5, 5)
    ),
    "IA3, convolution": Method(
        lambda: peft.IA3Config(target_modules=["square"], feedforward_modules=[]),
        base=lambda: Square(),
        batch=numbers(2, 6, 5, 5),
    ),
    "HiRA, convolutions": Method(
        lambda: peft.HiraConfig(r=2, target_modules=["line", "plane", "point"]),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "HiRA, embedding": Method(lambda: peft.HiraConfig(r=2, target_modules=["words"]), base=Embedded, batch=tokens),
    "TinyLoRA, embedding": Method(
        lambda: peft.TinyLoraConfig(r=2, u=4, target_modules=["words", "head"]), base=Embedded, batch=tokens
    ),
    "OFT, embedding": Method(
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["words"]), base=Embedded, batch=tokens
    ),
    "VeRA, transposed weights": Method(lambda: peft.VeraConfig(r=4, target_modules=["c_fc"]), base=gpt2),
    "HiRA, transposed weights": Method(lambda: peft.HiraConfig(r=2, target_modules=["c_fc"]), base=gpt2),
    # Variants of LoRA.
    "DoRA": Method(_lora(use_dora=True)),
    "DoRA, mixed": Method(
        _lora(
            use_dora=True, use_rslora=True, bias="lora_only", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5}
        ),
        base=trained_biases,
    ),
    "DoRA, convolutions": Method(
        _lora(use_dora=True, target_modules=["line", "plane", "point", "space"]),
        base=Convolutions,
        batch=numbers(2, 4, 2, 8, 8),
    ),
    "DoRA, embedding": Method(_lora(use_dora=True, target_modules=["words", "head"]), base=Embedded),
    "DoRA, transposed weights": Method(_lora(use_dora=True, target_modules=["c_attn", "c_proj"]), base=gpt2),
    "KaSA": Method(_lora(kasa_config=peft.KasaConfig())),
    "BD-LoRA": Method(
        _lora(
            r=4,
            target_modules=["q_proj", "o_proj", "v_proj"],
            use_bdlora=peft.BdLoraConfig(
                target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
            ),
        ),
        known=True,
    ),
    "VeLoRA": Method(_lora(velora_config=peft.VeloraConfig(num_groups=4)), known=True),
    "MonteCLoRA": Method(_lora(monteclora_config=peft.MontecloraConfig()), known=True),
}


class Square(nn.Module):
    """A convolution with a square kernel, the only ones that OFT takes."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x)
