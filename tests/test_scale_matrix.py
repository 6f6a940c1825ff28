"""The scale of every module, over all that says it: alpha, rank, rsLoRA, patterns, and each of them missing or zero.

As a file is found, each reader has a rule of its own, and ours is that of the format's own reader. As it is written
after a squeeze to ranks that differ, every reader of the format computes the same update.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf_cases
import kohya_cases
import mlx_cases
import pytest
import torch
from adapter_cases import CONFIG, PREFIX, WEIGHTS, plain_config, write_folder
from factor_cases import factors
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.plan import Plan, PlanRow

RANKS = {"q": 8, "v": 4}  # as found; r of the configuration is that of q
SMALL = {"q": 3, "v": 1}
MISSING = object()
Updates = dict[str, Tensor]
Reader = Callable[[Path], Updates]


def updates(adapter: Adapter) -> Updates:
    """dW of every module as read here, in float64; that of an embedding as (vocabulary, dim)."""
    dense = {name: adapter.update(name).dense() for name in adapter.modules}
    return {name: dW.mT if adapter.modules[name].kind == "embedding" else dW for name, dW in dense.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two readers compute the same updates; one that leaves out a module takes its update for zero."""
    names = one.keys() | other.keys()
    return all(
        torch.allclose(
            one.get(name, torch.zeros(())).double(), other.get(name, torch.zeros(())).double(), rtol=1e-5, atol=1e-7
        )
        for name in names
    )


def to_mixed_ranks(adapter: Adapter, ranks: Mapping[str, int], **options: Any) -> Adapter:
    return adapter.squeeze(plan=Plan({name: PlanRow(rank) for name, rank in ranks.items()}), **options)


# --- PEFT -----------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(20, 24, bias=False), nn.Linear(20, 12, bias=False)


def by_peft(folder: Path) -> Updates:
    """PEFT itself."""
    from peft import PeftModel

    with torch.random.fork_rng():
        model = PeftModel.from_pretrained(Base(), str(folder))
    layers = {name.removeprefix(PREFIX): layer for name, layer in model.named_modules()}
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }


def _peft_product(folder: Path, name: str, scale: float) -> Tensor:
    state = load_file(folder / WEIGHTS)
    A, B = (state[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
    return scale * (B @ A)


def _peft_names(folder: Path) -> list[str]:
    return [
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in load_file(folder / WEIGHTS) if "A" in key
    ]


def by_vllm(folder: Path) -> Updates:
    """One number for all modules, from r, lora_alpha and use_rslora; patterns are not read."""
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return {name: _peft_product(folder, name, scale) for name in _peft_names(folder)}


def by_converter(folder: Path) -> Updates:
    """llama.cpp's converter reads lora_alpha alone; alpha over the rank of each tensor, and 1 where it is 0."""
    alpha = json.loads((folder / CONFIG).read_text())["lora_alpha"]
    state = load_file(folder / WEIGHTS)
    ranks = {name: len(state[f"{PREFIX}{name}.lora_A.weight"]) for name in _peft_names(folder)}
    return {name: _peft_product(folder, name, alpha / rank if alpha else 1.0) for name, rank in ranks.items()}


def peft_folder(folder: Path, alpha: Any, rslora: bool, mixed: bool, alpha_pattern: Mapping[str, float] | None) -> Path:
    config = plain_config(r=RANKS["q"], use_rslora=rslora, target_modules=["q", "v"])
    del config["lora_alpha"]
    if alpha is not MISSING:
        config["lora_alpha"] = alpha
    if mixed:
        config["rank_pattern"] = {"v": RANKS["v"]}
    if alpha_pattern is not None:
        config["alpha_pattern"] = dict(alpha_pattern)
    tensors = {}
    for i, (name, out) in enumerate({"q": 24, "v": 12}.items()):
        B, A = factors(out, 20, RANKS[name] if mixed else RANKS["q"], "steps", seed=i)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A.float(), f"{PREFIX}{name}.lora_B.weight": B.float()}
    return write_folder(folder, tensors, config)


ALPHAS = {"missing": MISSING, "0": 0, "16": 16, "0.3": 0.3, "-4": -4}
PATTERNS: dict[str, Mapping[str, float] | None] = {"none": None, "v 6": {"v": 6}, "v 0": {"v": 0}, "all": {"q|v": 5}}
PEFT_MATRIX = list(itertools.product(ALPHAS, (False, True), (False, True), PATTERNS))
PEFT_IDS = [
    f"alpha {alpha}, {'rsLoRA' if rslora else 'LoRA'}, {'two ranks' if mixed else 'one rank'}, pattern {pattern}"
    for alpha, rslora, mixed, pattern in PEFT_MATRIX
]


@pytest.mark.parametrize(("alpha", "rslora", "mixed", "pattern"), PEFT_MATRIX, ids=PEFT_IDS)
def test_a_peft_folder(tmp_path: Path, alpha: str, rslora: bool, mixed: bool, pattern: str) -> None:
    folder = peft_folder(tmp_path / "in", ALPHAS[alpha], rslora, mixed, PATTERNS[pattern])
    adapter = lora_squeeze.load(folder)
    assert same(updates(adapter), by_peft(folder)), "as found: PEFT is the format's own reader"
    scales = [module.scale for module in adapter.modules.values()]
    if alpha != "missing":  # vLLM refuses a configuration without it
        config = json.loads((folder / CONFIG).read_text())
        one = config["lora_alpha"] / (math.sqrt(8) if rslora else 8)
        assert same(updates(adapter), by_vllm(folder)) == all(math.isclose(scale, one) for scale in scales)
    for policy in ("keep", "fold"):
        small = to_mixed_ranks(adapter, SMALL, alpha=policy)
        small.save(tmp_path / policy)
        expected = updates(small)
        assert same(expected, updates(lora_squeeze.load(tmp_path / policy)))
        assert same(by_peft(tmp_path / policy), expected)
        assert same(by_vllm(tmp_path / policy), expected), "one scale for all modules, whatever the source had"


def test_what_no_single_number_can_say_the_converter_of_llama_cpp_does_not_read(tmp_path: Path) -> None:
    """It divides one alpha by each tensor's own rank: a folder of two ranks is for a GGUF file to be written here."""
    folder = peft_folder(tmp_path / "in", 16, False, False, None)
    adapter = lora_squeeze.load(folder)
    assert same(by_converter(folder), updates(adapter))
    even, uneven = adapter.squeeze(rank=3), to_mixed_ranks(adapter, SMALL)
    even.save(tmp_path / "even")
    uneven.save(tmp_path / "uneven")
    assert same(by_converter(tmp_path / "even"), updates(even))
    assert not same(by_converter(tmp_path / "uneven"), updates(uneven))


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.0, 12.0, 0.3, -4.0, 1e-3], ids=str)
@pytest.mark.parametrize("policy", ["keep", "fold"])
def test_a_gguf_file(tmp_path: Path, alpha: float | None, policy: str) -> None:
    """llama.cpp: alpha / rank of the tensor, 1 where alpha is 0 or missing."""
    path = gguf_cases.write_gguf(tmp_path / "in.gguf", alpha=alpha)
    adapter = lora_squeeze.load(path)
    assert same(updates(adapter), {name: gguf_cases.definition(path, name) for name in gguf_cases.NAMES})
    ranks = {name: 1 + i % 4 for i, name in enumerate(gguf_cases.NAMES)}
    for name, small in {"mixed": to_mixed_ranks(adapter, ranks, alpha=policy), "one": adapter.squeeze(rank=2)}.items():
        small.save(out := tmp_path / f"{name}.gguf")
        assert same({n: gguf_cases.definition(out, n) for n in gguf_cases.NAMES}, updates(small))


# --- kohya ----------------------------------------------------------------------------------------------------------


def by_diffusers(path: Path) -> Updates:
    """The alpha that diffusers works out for each module of a file, over its rank."""
    from diffusers.utils.peft_utils import get_peft_kwargs

    state, _ = kohya_cases.read_kohya(path)
    names = [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]
    ranks = {f"{name}.lora_B.weight": state[f"{name}.lora_down.weight"].shape[0] for name in names}
    alphas = {f"{name}.alpha": state[f"{name}.alpha"].item() for name in names if f"{name}.alpha" in state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_kwargs(ranks, alphas or None, {key: None for key in ranks})
    result = {}
    for name in names:
        rank = found["rank_pattern"].get(name, found["r"])
        scale = found["alpha_pattern"].get(name, found["lora_alpha"]) / rank
        A, B = (state[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
        assert rank == len(A)
        result[name] = scale * (B @ A)
    return result


def by_rule(path: Path, rule: Callable[[Mapping[str, Tensor], str], Tensor]) -> Updates:
    state, _ = kohya_cases.read_kohya(path)
    return {name: rule(state, name) for name in kohya_cases.SHAPES if f"{name}.lora_down.weight" in state}


@pytest.mark.parametrize("alpha", [None, 0.0, 3.0, 0.3, -2.0, "two"], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "ranks that differ"])
@pytest.mark.parametrize("policy", ["keep", "fold"])
def test_a_kohya_file(tmp_path: Path, alpha: Any, mixed: bool, policy: str) -> None:
    names = list(kohya_cases.SHAPES)
    ranks = {name: 3 + i if mixed else 6 for i, name in enumerate(names)}
    alphas = {name: (3.0, 5.0)[i % 2] if alpha == "two" else alpha for i, name in enumerate(names)}
    path = kohya_cases.write_kohya(tmp_path / "in.safetensors", kohya_cases.kohya_tensors(ranks, alphas))
    adapter = lora_squeeze.load(path)
    ours = updates(adapter)
    assert same(ours, by_rule(path, kohya_cases.sd_scripts)), "as found: sd-scripts is the format's own reader"
    assert same(ours, by_rule(path, kohya_cases.comfyui)) == (alpha != 0.0), "ComfyUI takes an alpha of 0 for 0"
    small = to_mixed_ranks(adapter, {name: 1 + i % 3 for i, name in enumerate(names)}, alpha=policy)
    small.save(out := tmp_path / "out.safetensors")
    expected = updates(small)
    for reader in (kohya_cases.sd_scripts, kohya_cases.comfyui):
        assert same(by_rule(out, reader), expected)
    assert same(by_diffusers(out), expected)


# --- mlx-lm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.5, 0.0, -1.0, 20], ids=str)
@pytest.mark.parametrize("alpha", [None, mlx_cases.RANK], ids=["no alpha", "alpha of the rank"])
@pytest.mark.parametrize("rank", [2, 6])
def test_an_mlx_folder(tmp_path: Path, scale: float, alpha: int | None, rank: int) -> None:
    """mlx-lm: the scale as it stands, for all modules; early versions times alpha / rank, which must then be 1."""
    parameters = {"rank": mlx_cases.RANK, "scale": scale, "dropout": 0.0, **({"alpha": alpha} if alpha else {})}
    folder = mlx_cases.write_mlx(tmp_path / "in", config=mlx_cases.mlx_config(lora_parameters=parameters))
    adapter = lora_squeeze.load(folder)
    assert same(updates(adapter), {name: mlx_cases.definition(folder, name) for name in mlx_cases.NAMES})
    small = adapter.squeeze(rank=rank)
    small.save(tmp_path / "out")
    assert same({name: mlx_cases.definition(tmp_path / "out", name) for name in mlx_cases.NAMES}, updates(small))
    written = json.loads((tmp_path / "out" / CONFIG).read_text())["lora_parameters"]
    assert written["rank"] == rank and written.get("alpha", rank) == rank
