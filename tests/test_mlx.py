"""mlx-lm adapters: what is read is what mlx-lm computes, what is written loads there, everything else is refused."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import tail, write_folder
from folder_cases import tree
from mlx_cases import (
    CONFIG,
    EMBEDDING,
    NAMES,
    RANK,
    SCALE,
    SWITCH,
    WEIGHTS,
    definition,
    mlx_config,
    mlx_tensors,
    read_mlx,
    write_mlx,
)
from torch import Tensor

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import mlx, to_mlx

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_mlx(tmp_path / "source")


def dense(adapter: Adapter, name: str) -> Tensor:
    """The update that was read, as the base weight has its axes."""
    update = adapter.update(name)
    dW = update.scale * (update.B.double() @ update.A.double())
    return dW.T if name in EMBEDDING else dW


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_every_kind_of_layer_is_read_as_the_format_defines_it(source: Path) -> None:
    adapter = mlx.load(source)
    assert tuple(sorted(adapter.modules)) == tuple(sorted(NAMES)) and adapter.rank == RANK
    assert {m.kind for m in adapter.modules.values()} == {"linear", "embedding", "experts"}
    for name in NAMES:
        torch.testing.assert_close(dense(adapter, name), definition(source, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_copy_has_the_same_bits_keys_and_settings(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_mlx(tmp_path / "source", mlx_tensors(dtype=dtype))
    mlx.load(source).save(tmp_path / "copy")
    (config, tensors), (before, expected) = read_mlx(tmp_path / "copy"), read_mlx(source)
    assert config == before
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) and tensors[key].dtype == dtype for key in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_dtype_that_mlx_does_not_have_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = mlx.load(write_mlx(tmp_path / "source", mlx_tensors(dtype=dtype)))
    with pytest.raises(LoraSqueezeError, match=f"MLX cannot read factors of {dtype}; .*--dtype float16"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapter.squeeze(rank=2, dtype=torch.float16).save(tmp_path / "out")


def test_a_model_card_that_is_a_link_out_of_the_folder_is_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    (source / "README.md").symlink_to("../secret")
    adapter = mlx.load(source)
    assert "README.md: a link that leads out of the folder; it is not copied" in adapter.notes
    adapter.save(tmp_path / "out")
    assert all("private" not in path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())


def test_an_adapter_of_repeated_layers_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", config=config))
    with pytest.raises(LoraSqueezeError, match=r"layer_replication: .* mlx-lm would add its updates to other layers"):
        to_mlx.adopt(adapter)


@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_a_squeeze_is_the_best_approximation_and_keeps_or_folds_the_scale(
    source: Path, tmp_path: Path, alpha: Any
) -> None:
    mlx.load(source).squeeze(rank=2, alpha=alpha).save(tmp_path / "out")
    config, tensors = read_mlx(tmp_path / "out")
    expected = {**mlx_config()["lora_parameters"], "rank": 2, "scale": SCALE if alpha == "keep" else 1.0}
    assert config == mlx_config(lora_parameters=expected)
    for name in NAMES:
        before, after = definition(source, name), definition(tmp_path / "out", name)
        pairs = zip(before, after, strict=True) if name in SWITCH else [(before, after)]
        for whole, cut in pairs:
            assert torch.linalg.matrix_rank(cut, rtol=1e-4) == 2
            assert float((whole - cut).norm()) == pytest.approx(tail(whole, 2), rel=1e-4)
        rank_axes = (1, 2) if name in SWITCH else (1, 0)
        assert [tensors[f"{name}.lora_{side}"].shape[axis] for side, axis in zip("ab", rank_axes, strict=True)] == [
            2,
            2,
        ]


def test_all_modules_get_the_largest_rank_that_one_of_them_needs(source: Path) -> None:
    adapter = mlx.load(source)
    needed = {}
    for name in NAMES:
        whole = definition(source, name)
        for dW in whole if name in SWITCH else [whole]:
            energy = torch.linalg.svdvals(dW).square()
            needed[name, len(needed)] = 1 + int((energy.cumsum(0) < 0.9 * energy.sum()).sum())
    assert len(set(needed.values())) > 1, "otherwise the test says nothing"
    squeezed = adapter.squeeze(energy=0.9)
    assert {module.rank for module in squeezed.modules.values()} == {max(needed.values())}
    assert any("one rank for all modules" in note for note in adapter.notes)


def mixed_tensors() -> dict[str, Tensor]:
    tensors = mlx_tensors()
    tensors[f"{Q}.lora_a"], tensors[f"{Q}.lora_b"] = tensors[f"{Q}.lora_a"][:, :2], tensors[f"{Q}.lora_b"][:2]
    up = next(iter(SWITCH))
    tensors[f"{up}.lora_a"], tensors[f"{up}.lora_b"] = tensors[f"{up}.lora_a"][:, :4], tensors[f"{up}.lora_b"][..., :4]
    return tensors


def test_ranks_that_differ_are_filled_up_with_zeros_to_the_largest(tmp_path: Path) -> None:
    source = write_mlx(tmp_path / "source", mixed_tensors())
    adapter = mlx.load(source)
    adapter.save(tmp_path / "out")
    config, tensors = read_mlx(tmp_path / "out")
    assert config["lora_parameters"]["rank"] == RANK
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in mlx_tensors().items()}
    assert not tensors[f"{Q}.lora_a"][:, 2:].any() and not tensors[f"{Q}.lora_b"][2:].any()
    for name in NAMES:
        assert torch.equal(definition(tmp_path / "out", name), definition(source, name))
    assert any(f"{Q}: the configuration says rank {RANK}, the tensors have 2" in note for note in adapter.notes)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= adapter.lora_bytes + adapter.format.overhead_bytes(adapter)


def test_modules_of_several_scales_are_written_with_one(source: Path, tmp_path: Path) -> None:
    """As a conversion from another format may give them."""
    adapter = mlx.load(source)
    mixed = replace(
        adapter,
        modules={name: replace(module, scale=i + 0.5) for i, (name, module) in enumerate(adapter.modules.items())},
    )
    mixed.save(tmp_path / "out")
    assert read_mlx(tmp_path / "out")[0]["lora_parameters"]["scale"] == SCALE
    for name, module in mixed.modules.items():
        close(definition(tmp_path / "out", name), definition(source, name) / SCALE * module.scale)


@pytest.mark.parametrize("extra", [0, 1, 700, 4000], ids=lambda n: f"smallest+{n}")
def test_a_size_holds_for_the_weights_file(source: Path, tmp_path: Path, extra: int) -> None:
    adapter = mlx.load(source)
    with pytest.raises(LoraSqueezeError, match="too small: the smallest possible is") as refused:
        adapter.squeeze(size=100)
    text = str(refused.value).split("the smallest possible is ")[1].split()[0]
    smallest = int(text.replace(",", ""))
    adapter.squeeze(size=smallest + extra).save(tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= smallest + extra


def test_tensors_trained_in_full_are_carried_along(tmp_path: Path) -> None:
    norm = torch.arange(16.0)
    source = write_mlx(tmp_path / "source", {**mlx_tensors(), "model.norm.weight": norm})
    adapter = mlx.load(source)
    adapter.squeeze(rank=2).save(tmp_path / "out")
    assert torch.equal(read_mlx(tmp_path / "out")[1]["model.norm.weight"], norm)
    assert adapter.extras["model.norm.weight"].kind == "module to save"
    assert any("'model.norm.weight': no factor of a LoRA" in note for note in adapter.notes)


def test_the_header_tells_what_was_done_and_a_model_card_is_continued(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("# Mine\n")
    adapter = mlx.load(source)
    adapter.squeeze(rank=4).save(tmp_path / "one")
    mlx.load(tmp_path / "one").squeeze(rank=2).save(tmp_path / "two")
    steps = mlx.load(tmp_path / "two").history
    assert [step["rule"] for step in steps] == ["rank=4", "rank=2"]
    assert steps[0]["source_sha256"] == adapter.source.digest()
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.startswith("# Mine\n") and "rank: 2 in 5 modules" in card


def test_an_alpha_beside_scale_follows_the_rank_so_that_it_multiplies_by_1(tmp_path: Path) -> None:
    """Early versions of mlx-lm take scale * alpha / rank."""
    parameters = {"rank": RANK, "alpha": RANK, "scale": SCALE, "dropout": 0.0}
    source = write_mlx(tmp_path / "source", config=mlx_config(lora_parameters=parameters))
    mlx.load(source).squeeze(rank=2).save(tmp_path / "out")
    assert read_mlx(tmp_path / "out")[0]["lora_parameters"] == {**parameters, "rank": 2, "alpha": 2}


def test_the_source_and_an_existing_folder_are_never_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    adapter = mlx.load(source)
    with pytest.raises(LoraSqueezeError, match="is the folder that the adapter is read from"):
        adapter.save(source, force=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match="exists already and nothing was written"):
        adapter.save(tmp_path / "out")
    assert tree(tmp_path) == before
    adapter.save(tmp_path / "out", force=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mine", CONFIG, WEIGHTS}


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    tensors = mlx_tensors()
    tensors[f"{next(iter(SWITCH))}.lora_b"][0, 0, 0] = float("nan")
    adapter = mlx.load(write_mlx(tmp_path / "source", tensors))
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match=rf"^{next(iter(SWITCH))}: .*NaN"):
        adapter.squeeze(rank=2).save(tmp_path / "deep" / "out")
    assert tree(tmp_path) == before


def with_parameters(**changes: Any) -> dict[str, Any]:
    return mlx_config(lora_parameters={**mlx_config()["lora_parameters"], **changes})


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": (mlx_config(fine_tune_type="dora"), "'dora' cannot be squeezed: DoRA: its magnitude vector"),
    "use_dora": (mlx_config(use_dora=True), "Way out: merge it into the model with mlx_lm.fuse"),
    "full": (mlx_config(fine_tune_type="full"), "the file holds whole weights: there are no factors to squeeze"),
    "unknown type": (mlx_config(fine_tune_type="vera"), "fine_tune_type 'vera' cannot be squeezed: this kind is not"),
    "no parameters": (mlx_config(lora_parameters=None), "lora_parameters must be an object with rank and scale"),
    "rank 0": (with_parameters(rank=0), "rank must be a whole number from 1, found 0"),
    "true rank": (with_parameters(rank=True), "rank must be a whole number from 1, found True"),
    "no scale": (with_parameters(scale=None), "scale must be a finite number, found None"),
    "infinite scale": (with_parameters(scale=float("inf")), "scale must be a finite number, found inf"),
    "alpha": (with_parameters(alpha=16), "alpha is 16 beside rank 6 and scale 2.5: early versions of mlx-lm"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_configuration_that_cannot_be_squeezed_is_refused_with_the_way_out(tmp_path: Path, case: str) -> None:
    config, text = BAD_CONFIGS[case]
    with pytest.raises(LoraSqueezeError) as error:
        mlx.load(write_mlx(tmp_path / "source", config=config))
    assert text in str(error.value) and str(tmp_path / "source" / CONFIG) in str(error.value)


SQUARE = torch.ones(RANK, 9)
BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "orphan": ({f"{Q}.lora_b": None}, f"orphan factor '{Q}.lora_a': its partner"),
    "magnitude": ({f"{Q}.m": torch.ones(24)}, f"'{Q}.m' cannot be squeezed: DoRA"),
    "not fitting": ({f"{Q}.lora_b": torch.ones(5, 24)}, "lora_b' is [5, 24]; expected (in, r) and (r, out)"),
    "three and two": ({f"{Q}.lora_b": torch.ones(2, RANK, 24)}, "expected (in, r) and (r, out)"),
    "experts": ({f"{next(iter(SWITCH))}.lora_b": torch.ones(2, 20, RANK)}, "expected (experts, r, in) and (experts"),
    "of PEFT": ({f"{Q}.lora_a": torch.ones(RANK, 16), f"{Q}.lora_b": torch.ones(24, RANK)}, "transposed as in PEFT"),
    "of PEFT, square": ({f"{Q}.lora_a": SQUARE, f"{Q}.lora_b": SQUARE.T}, "mlx-lm would compute another function"),
    "quantised": ({f"{Q}.lora_a": torch.ones(16, RANK, dtype=torch.int32)}, "torch.int32; quantised factors are not"),
    "of another kind": ({f"{Q}.lora_a_scales": torch.ones(3)}, "is no tensor that a plain mlx-lm LoRA has"),
    "a list": ({f"{Q}.lora_a.0": torch.ones(3)}, "is no tensor that a plain mlx-lm LoRA has"),
    "empty": ({f"{Q}.lora_a": torch.ones(0, RANK)}, "has shape [0, 6]: it is empty"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_of_another_meaning_are_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, text = BAD_TENSORS[case]
    tensors = {key: tensor for key, tensor in {**mlx_tensors(), **changes}.items() if tensor is not None}
    with pytest.raises(LoraSqueezeError) as error:
        mlx.load(write_mlx(tmp_path / "source", tensors))
    assert text in str(error.value) and str(error.value).startswith(str(tmp_path / "source"))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="no LoRA factors among 1 tensors"):
        mlx.load(write_mlx(tmp_path / "other", {"x": torch.ones(2)}))
    source = write_mlx(tmp_path / "source")
    (source / WEIGHTS).unlink()
    with pytest.raises(LoraSqueezeError, match=f"no {WEIGHTS}; the adapter is incomplete"):
        mlx.load(source)
    (source / CONFIG).write_text("{")
    with pytest.raises(LoraSqueezeError, match="not valid JSON"):
        mlx.load(source)
    (source / CONFIG).write_text("[]")
    with pytest.raises(LoraSqueezeError, match="expected an object, found list"):
        mlx.load(source)


def test_it_is_told_from_other_formats_by_its_configuration(source: Path, tmp_path: Path) -> None:
    old = write_mlx(tmp_path / "old", config={"lora_parameters": {}, "num_layers": 2})
    ours = (source, source / CONFIG, source / WEIGHTS, old)
    peft = write_folder(tmp_path / "peft")
    for name, text in {"list": "[]", "broken": "{", "bytes": "\udcff", "deep": "[" * 10**5}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text(text, errors="surrogateescape")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / CONFIG)
    (source / "other.safetensors").write_text("")
    others = (peft, peft / CONFIG, source / "other.safetensors", tmp_path, tmp_path / "nothing")
    folders = tuple(tmp_path / name for name in ("list", "broken", "bytes", "deep", "pipe"))
    assert [mlx.matches(path) for path in ours] == [True] * len(ours)
    assert [path for path in others + folders if mlx.matches(path)] == []
    assert mlx.load(source / WEIGHTS).modules.keys() == mlx.load(source).modules.keys()


def test_mlx_lm_itself_loads_what_is_written_as_the_same_update(tmp_path: Path) -> None:
    """Its own loader on a model of its own layers; only where mlx-lm is installed."""
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm.models.switch_layers as switch
    import numpy as np

    class Block(nn.Module):
        def __init__(self, experts: bool) -> None:
            super().__init__()
            self.self_attn = nn.Module()
            self.self_attn.q_proj = nn.Linear(16, 24, bias=False)
            if experts:
                self.mlp = nn.Module()
                self.mlp.switch_mlp = nn.Module()
                self.mlp.switch_mlp.up_proj = switch.SwitchLinear(16, 20, 3, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(40, 16)
            self.model.layers = [Block(False), Block(True)]
            self.lm_head = nn.Linear(16, 40, bias=False)

        @property
        def layers(self) -> list[Any]:
            found: list[Any] = self.model.layers
            return found

    keys = ["self_attn.q_proj", "mlp.switch_mlp.up_proj", "lm_head", "model.embed_tokens"]
    source = write_mlx(tmp_path / "source", mixed_tensors(), with_parameters(keys=keys))
    mlx.load(source).save(tmp_path / "copy")
    mlx.load(source).squeeze(rank=3).save(tmp_path / "squeezed")
    for folder in (tmp_path / "copy", tmp_path / "squeezed"):
        model = tuner.load_adapters(Model(), str(folder))
        modules = dict(model.named_modules())
        for name in NAMES:
            layer = modules[name]
            base = layer.embedding if name in EMBEDDING else layer.linear
            change = np.array(layer.fuse().weight - base.weight, dtype=np.float64)
            close(torch.from_numpy(change), definition(folder, name))
    with pytest.raises(ValueError, match="does not match"):
        tuner.load_adapters(Model(), str(source))
    mx.synchronize()
