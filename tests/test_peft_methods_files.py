"""PEFT's other methods: base models on disk, what is carried along, what is refused and why, and their table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from peft_cases import Grouped, gpt2, llama, tied_llama
from peft_methods_cases import METHODS, Method, made, on_base, outputs, quiet
from peft_models import read_config, save, seeded, tensors, write_config
from torch import nn

from lora_squeeze.base_model import open_base
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft_methods
from lora_squeeze.formats.peft_methods import TABLE, row_of, with_base
from lora_squeeze.methods.catalogue import adapter_entries

DOCS = Path(__file__).parents[1] / "docs" / "convert-methods.md"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, config: dict, **shapes: tuple[int, ...]) -> Path:
    """A folder with this configuration and tensors of these shapes, their keys with __ for a point."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    numbers = {f"base_model.model.{key.replace('__', '.')}": torch.ones(shape) for key, shape in shapes.items()}
    safetensors.torch.save_file(numbers, folder / WEIGHTS)
    return folder


def on_disk(build: Callable[[], nn.Module], folder: Path, **options: object) -> Path:
    seeded(build).save_pretrained(str(folder), **options)
    return folder


def error(folder: Path, **options: object) -> str:
    with pytest.raises(LoraSqueezeError) as caught:
        peft_methods.load(folder, **options)
    text = str(caught.value)
    assert text.startswith(f"{folder}: ") and "\n" not in text
    return text.removeprefix(f"{folder}: ")


# The table.


def test_the_table_has_every_method_of_peft_and_no_other():
    methods = [row.peft_type for row in TABLE if row.field is None]
    ours = adapter_entries()  # other tests may have registered them
    assert sorted(methods) == sorted(kind.value for kind in peft.PeftType if kind.value not in ours)


def test_the_variants_of_the_table_are_fields_of_a_lora_configuration():
    fields = set(peft.LoraConfig.__dataclass_fields__)
    assert {row.field for row in TABLE if row.field} <= fields


def test_the_prefixes_of_the_table_are_those_of_peft():
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as PREFIXES

    for row in TABLE:
        for prefix in row.prefixes:
            assert PREFIXES[peft.PeftType(row.peft_type)].startswith(prefix), row.name


def test_every_method_with_an_update_is_tested_against_peft():
    rows = {row.name for row in TABLE if row.route in ("exact", "squeezed")}
    assert rows - {name.partition(",")[0] for name in METHODS} == {"QALoRA"}  # whose layers need a GPTQ kernel


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_the_documentation_has_every_row(row):
    line = next((line for line in DOCS.read_text().splitlines() if line.startswith(f"| {row.name} |")), "")
    assert line, f"{row.name} is not in {DOCS.name}"
    if row.route != "impossible":
        assert row.update in line and row.rank in line
    assert (row.route in ("exact", "squeezed") and row.needs_base) == ("with base" in line)


def test_a_row_needs_the_base_exactly_where_the_file_does_not_tell():
    for name, method in METHODS.items():
        row = next(row for row in TABLE if row.name == name.partition(",")[0])
        picked = name == "Uni-LoRA, saved indices"
        # Of convolutions the base alone tells the kernel.
        assert method.known == (picked or not row.needs_base) or name.endswith("convolutions"), name


# Base models on disk.


@pytest.mark.parametrize("name", ["DoRA", "OFT", "VeRA", "DoRA, transposed weights"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_a_base_model_on_disk_gives_what_the_live_one_gives(name, shards, tmp_path):
    method = METHODS[name]
    adapter = made(method, tmp_path / "adapter")
    size = {"max_shard_size": "3KB"} if shards == "shards" else {}
    base = open_base(on_disk(method.base, tmp_path / "base", **size))
    found = peft_methods.load(tmp_path / "adapter", base=base)
    for module in adapter.adapter.modules:
        assert torch.equal(found.update(module).dense(), adapter.adapter.update(module).dense())


def test_a_dora_reads_of_the_base_only_the_weights_that_it_adapts(tmp_path, monkeypatch):
    adapter = made(METHODS["DoRA"], tmp_path / "adapter")
    base = open_base(on_disk(llama, tmp_path / "base"))
    read: list[str] = []
    pieces = type(base).pieces
    monkeypatch.setattr(type(base), "pieces", lambda self, key: read.append(key) or pieces(self, key))
    monkeypatch.setattr(with_base, "layers", None)  # which would build the model
    found = peft_methods.load(adapter.folder, base=base)
    assert read == []
    name = next(iter(found.modules))
    found.update(name)
    assert read == [f"{name}.weight"]


def test_the_weight_of_a_tied_head_is_that_of_the_embedding(tmp_path):
    """Which alone is in the files of the model."""
    method = Method(lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True), tied_llama)
    adapter = made(method, tmp_path / "adapter")
    base = open_base(on_disk(method.base, tmp_path / "base"))
    assert not [key for key in base.facts if "lm_head" in key]
    found = peft_methods.load(tmp_path / "adapter", base=base)
    assert torch.equal(found.update("lm_head").dense(), adapter.adapter.update("lm_head").dense())


def test_a_base_model_in_memory_stays_as_it_is(tmp_path):
    for name in ("KaSA", "OSF", "FRoD"):
        adapter = made(METHODS[name], tmp_path / name)
        base = seeded(llama)
        names = [name for name, _ in base.named_modules()]
        for module in peft_methods.load(adapter.folder, base=base).modules.values():
            assert module.name in names
        assert [name for name, _ in base.named_modules()] == names
        fresh = dict(seeded(llama).named_parameters())
        assert all(torch.equal(p, fresh[n]) and p.requires_grad for n, p in base.named_parameters())


def test_reading_leaves_the_global_generator_as_it_was(tmp_path):
    adapter = made(METHODS["VeRA"], tmp_path)
    before = torch.get_rng_state()
    found = peft_methods.load(tmp_path, base=adapter.base)
    found.update(next(iter(found.modules)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_in_16_bits_is_computed_in_more_and_written_in_16(tmp_path):
    method = METHODS["LoHa"]
    adapter = made(method, tmp_path / "adapter")
    rounded = {key: tensor.bfloat16() for key, tensor in tensors(adapter.folder).items()}
    safetensors.torch.save_file(rounded, adapter.folder / WEIGHTS, {"format": "pt"})
    found = peft_methods.load(adapter.folder)
    name, module = next(iter(found.modules.items()))
    w = {key.rpartition(".")[2]: t.double() for key, t in rounded.items() if f".{name}." in key}
    expected = 3.0 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])  # alpha / r = 6 / 2
    assert module.dtype == torch.bfloat16 and found.update(name).dtype == torch.float32
    torch.testing.assert_close(found.update(name).dense().double(), expected, rtol=1e-5, atol=1e-6)
    found.save(tmp_path / "lora")
    assert {tensor.dtype for tensor in tensors(tmp_path / "lora").values()} == {torch.bfloat16}


def test_files_beside_it_that_are_links_out_of_the_folder_are_not_copied(tmp_path):
    folder = made(METHODS["LoHa"], tmp_path / "adapter").folder
    (tmp_path / "secret").write_text("private")
    for name in ("README.md", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
    found = peft_methods.load(folder)
    assert sum("a link that leads out of the folder; it is not copied" in note for note in found.notes) == 2
    found.save(tmp_path / "lora")
    assert "private" not in (tmp_path / "lora" / "README.md").read_text()
    assert not (tmp_path / "lora" / "tokenizer.json").exists()


# What a squeeze and the file say.


def test_a_squeezed_full_update_is_its_best_approximation_and_the_energy_says_so(tmp_path):
    adapter = made(METHODS["HiRA"], tmp_path / "adapter")
    small = adapter.adapter.squeeze(rank=3)
    small.save(tmp_path / "lora")
    for row in small.report.rows:
        S = torch.linalg.svdvals(adapter.delta(row.name)).square()
        assert row.energy == pytest.approx(float(S[:3].sum() / S.sum()), rel=1e-4)
    assert read_config(tmp_path / "lora")["r"] == 3
    assert torch.isfinite(outputs(on_base(adapter.method, tmp_path / "lora"), adapter.method)).all()


def test_the_written_configuration_is_a_lora_with_what_both_have_in_common(tmp_path):
    adapter = made(METHODS["BOFT, trained biases"], tmp_path / "adapter")
    write_config(adapter.folder, base_model_name_or_path="some/model", revision="main")
    found = peft_methods.load(adapter.folder, base=adapter.base)
    found.save(tmp_path / "lora")
    config = read_config(tmp_path / "lora")
    assert config["peft_type"] == "LORA" and config["bias"] == "lora_only" and not config["lora_bias"]
    assert config["base_model_name_or_path"] == "some/model" and config["revision"] == "main"
    assert set(config) <= set(peft.LoraConfig.__dataclass_fields__)
    assert config["target_modules"] == sorted(found.modules)
    assert {extra.kind for extra in found.extras.values()} == {"bias"}


def test_a_changed_bias_becomes_a_bias_of_b_in_every_module(tmp_path):
    adapter = made(METHODS["RoAd, some biases"], tmp_path)
    found, merged = adapter.adapter, dict(adapter.merged.named_parameters())
    assert any(p.any() for n, p in merged.items() if n.endswith("q_proj.bias"))
    kinds = {extra.module: found.extra(key) for key, extra in found.extras.items() if extra.kind == "lora bias"}
    assert set(kinds) == set(found.modules) and found.config["lora_bias"]
    assert not kinds["lm_head"].any()  # which has no bias
    for name in set(found.modules) - {"lm_head"}:
        change = merged[f"{name}.bias"] - adapter.base.get_submodule(name).bias
        torch.testing.assert_close(kinds[name], change.detach())
    assert {module.floor for module in found.modules.values()} == {1}


def test_without_a_bias_in_the_model_there_is_none_in_the_lora(tmp_path):
    found = made(METHODS["IA3"], tmp_path).adapter
    assert not found.extras and not found.config["lora_bias"]


def test_a_plain_lora_is_read_as_such(tmp_path):
    folder = write(tmp_path, PLAIN, a__q_proj__lora_A__weight=(2, 4), a__q_proj__lora_B__weight=(3, 2))
    assert peft_methods.load(folder).format.name == "peft"


def test_a_qalora_is_the_lora_that_its_forward_pass_computes(tmp_path):
    size, rank, out, groups = 4, 2, 6, 3
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, groups, generator=generator), torch.randn(out, rank, generator=generator)
    config = {**PLAIN, "use_qalora": True, "qalora_group_size": size}
    write(tmp_path, config)
    keys = {f"base_model.model.q_proj.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
    safetensors.torch.save_file(keys, tmp_path / WEIGHTS)
    layer = nn.Module()
    layer.in_features, layer.qalora_group_size, layer.scaling = groups * size, {"a": size}, {"a": 2.0}
    layer.lora_dropout = nn.ModuleDict({"a": nn.Identity()})
    layer.lora_A = nn.ModuleDict({"a": nn.Linear(groups, rank, bias=False)})
    layer.lora_B = nn.ModuleDict({"a": nn.Linear(rank, out, bias=False)})
    layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = A, B
    with torch.no_grad():
        expected = QALoraLinearVariant.forward(layer, "a", torch.eye(groups * size), torch.zeros(out)).T
    found = peft_methods.load(tmp_path)
    assert found.modules["q_proj"].rank == rank
    torch.testing.assert_close(found.update("q_proj").dense(), expected)


# Refused.


@pytest.mark.parametrize("row", [r for r in TABLE if r.route == "impossible"], ids=lambda row: row.name)
def test_a_method_without_an_update_is_refused_with_the_reason(row, tmp_path):
    config = {"peft_type": row.peft_type} | ({row.field: {"x": 1}} if row.field else {})
    assert error(write(tmp_path, config, x__y=(1,))) == f"{row.name} cannot become a LoRA: {row.why}"


@pytest.mark.parametrize("row", [r for r in TABLE if r.needs_base], ids=lambda row: row.name)
def test_a_missing_base_model_is_asked_for(row, tmp_path):
    config = {"peft_type": row.peft_type} | ({row.field: {"x": 1}} if row.field else {})
    text = error(write(tmp_path, config, x__y=(1,)))
    assert text.startswith(f"{row.name} becomes a LoRA with its base model only ({row.why})") and "--base MODEL" in text


def test_an_unknown_method_is_refused(tmp_path):
    text = error(write(tmp_path, {"peft_type": "NEWTUNE"}, x__y=(1,)))
    assert "NEWTUNE" in text and "save_as_lora" in text


def test_two_variants_in_one_are_refused():
    with pytest.raises(LoraSqueezeError, match="DoRA and BD-LoRA at once"):
        row_of({**PLAIN, "use_dora": True, "use_bdlora": {"nblocks": 2}})


# A method and one of its tensors; of the others a file without it, or with it in another shape, may be whole.
NEEDED = {
    "AdaLoRA": "lora_E",
    "LoHa": "hada_w2_a",
    "LoKr, both in factors": "lokr_w1_a",
    "VB-LoRA": "vblora_logits_B",
    "VB-LoRA, saved in short": "vblora_logits_A_topk_indices",
    "Uni-LoRA, saved indices": "unilora_indices_A",
    "DeLoRA": "delora_w_norm",
    "GraLoRA": "gralora_B",
    "BD-LoRA": "lora_B.weight",
    "VeLoRA": "lora_A.weight",
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(name, tmp_path):
    made(METHODS[name], tmp_path)
    whole = tensors(tmp_path)
    key = next(key for key in whole if key.endswith(f".{NEEDED[name]}"))
    safetensors.torch.save_file({k: t for k, t in whole.items() if k != key}, tmp_path / WEIGHTS)
    assert "get it again" in error(tmp_path)
    odd = torch.zeros(tuple(size + 1 for size in whole[key].shape), dtype=whole[key].dtype)
    safetensors.torch.save_file({**whole, key: odd}, tmp_path / WEIGHTS)
    assert "do not fit" in error(tmp_path)


@pytest.mark.parametrize("name", ["VB-LoRA", "Uni-LoRA, saved indices"])
def test_a_shared_tensor_that_is_missing_is_refused(name, tmp_path):
    made(METHODS[name], tmp_path)
    whole = {key: tensor for key, tensor in tensors(tmp_path).items() if key.count(".") > 1}
    safetensors.torch.save_file(whole, tmp_path / WEIGHTS)
    assert "get it again" in error(tmp_path)


def test_a_folder_that_is_no_peft_adapter_is_refused(tmp_path):
    assert "adapter_config.json" in error(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    assert "expected an object" in error(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    assert "no adapter_model.safetensors" in error(tmp_path)


def test_a_dora_with_a_base_of_another_shape_or_name_or_quantised_is_refused(tmp_path):
    adapter = made(METHODS["DoRA"], tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    wide = lambda: llama(hidden_size=32)  # noqa: E731
    assert f"{name}: the base weight is [32, 32], the update [16, 16]" in error(tmp_path, base=seeded(wide))
    assert f"{name}: the base model given has no such weight" in error(tmp_path, base=seeded(gpt2))
    quantised = seeded(llama)
    quantised.get_submodule(name).weight = nn.Parameter(torch.zeros(128, dtype=torch.uint8), requires_grad=False)
    assert "uint8" in error(tmp_path, base=quantised) and "16 or 32 bits" in error(tmp_path, base=quantised)
    disk = open_base(on_disk(gpt2, tmp_path / "gpt2"))
    assert f"{name}: {disk.name} has no such weight" in error(tmp_path, base=disk)
    assert adapter.adapter


def test_a_dora_without_one_of_its_magnitudes_is_refused(tmp_path):
    adapter = made(METHODS["DoRA"], tmp_path)
    whole = tensors(tmp_path)
    key = next(key for key in whole if key.endswith("magnitude_vector"))
    safetensors.torch.save_file({k: t for k, t in whole.items() if k != key}, tmp_path / WEIGHTS)
    assert "here one is missing" in error(tmp_path, base=adapter.base)
    safetensors.torch.save_file({**whole, key: whole[key][:-1]}, tmp_path / WEIGHTS)
    assert "expected 16 numbers" in error(tmp_path, base=adapter.base)


def test_an_incomplete_file_is_refused_where_peft_only_warns(tmp_path):
    adapter = made(METHODS["OFT"], tmp_path)
    whole = tensors(tmp_path)
    safetensors.torch.save_file(dict(list(whole.items())[1:]), tmp_path / WEIGHTS)
    assert "the file is incomplete" in error(tmp_path, base=adapter.base)


def test_what_peft_cannot_load_on_the_base_is_refused_with_its_reason(tmp_path):
    made(METHODS["OFT"], tmp_path)
    wide = lambda: llama(hidden_size=32)  # noqa: E731
    assert "PEFT cannot load this OFT on the base model (" in error(tmp_path, base=seeded(wide))


def test_a_base_that_transformers_cannot_build_is_refused(tmp_path):
    made(METHODS["OFT"], tmp_path / "adapter")
    folder = tmp_path / "base"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    text = error(tmp_path / "adapter", base=open_base(folder))
    assert "transformers cannot build this base model" in text and "base=" in text


def test_a_base_without_a_weight_that_is_adapted_is_refused_where_transformers_makes_one_up(tmp_path):
    made(METHODS["OFT"], tmp_path / "adapter")
    folder = on_disk(llama, tmp_path / "base")
    file = folder / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    name = "model.layers.1.self_attn.q_proj"
    safetensors.torch.save_file({k: t for k, t in whole.items() if k != f"{name}.weight"}, file, {"format": "pt"})
    assert error(tmp_path / "adapter", base=open_base(folder)).startswith(f"{name}: the base model has no such weight")


def test_an_oft_of_a_convolution_is_refused_since_no_weight_is_its_forward_pass(tmp_path):
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Conv2d(6, 4, 3)

    with quiet():
        save(peft.get_peft_model(Square(), peft.OFTConfig(oft_block_size=3, target_modules=["square"])), tmp_path)
    assert "overlapping" in error(tmp_path, base=Square())


@pytest.mark.parametrize("name", ["IA3", "LoHa"])
def test_a_convolution_in_groups_is_refused(name, tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["conv"])
    if name == "IA3":
        config = peft.IA3Config(target_modules=["conv"], feedforward_modules=[])
    with quiet():
        save(peft.get_peft_model(Grouped(), config), tmp_path)
    assert error(tmp_path, base=Grouped()).startswith("conv: a convolution in groups")


def test_a_rank_above_the_one_told_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(with_base._RANKS, "HIRA", lambda layer, name: 1)
    found = made(METHODS["HiRA"], tmp_path).adapter
    with pytest.raises(LoraSqueezeError, match="beyond the rank 1"):
        found.update(next(iter(found.modules)))


def test_the_source_folder_is_never_written_to(tmp_path):
    found = made(METHODS["LoHa"], tmp_path).adapter
    with pytest.raises(LoraSqueezeError, match="is the folder that the adapter is read from"):
        found.save(tmp_path, force=True)


@pytest.mark.parametrize(
    ("changes", "when"),
    [
        ({"peft_type": "LOHA", "alpha": "much"}, "late"),
        ({"peft_type": "LOHA", "alpha": None}, "late"),
        ({"peft_type": "LOKR", "r": 0}, "early or late"),
        ({"peft_type": "LORA", "use_qalora": True, "qalora_group_size": -1}, "early"),
        ({"peft_type": "LORA", "use_qalora": True, "qalora_group_size": 1e400}, "early"),
        ({"peft_type": "LORA", "use_qalora": True, "use_newlora": True}, "early"),
        ({"peft_type": "LORA", "use_bdlora": {"nblocks": []}, "target_modules": 3}, "early"),
    ],
)
def test_settings_of_the_wrong_kind_become_one_line(tmp_path: Path, changes: dict[str, Any], when: str) -> None:
    """Every method has settings of its own; some show only when the factors are computed."""
    key = "base_model.model.layers.0.q"
    hada = {f"{key}.hada_w{i}_a": torch.ones(4, 2) for i in (1, 2)}
    hada |= {f"{key}.hada_w{i}_b": torch.ones(2, 3) for i in (1, 2)}
    kron = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(2, 2)}
    plain = {f"{key}.lora_A.weight": torch.ones(2, 2), f"{key}.lora_B.weight": torch.ones(4, 2)}
    tensors = {"LOHA": hada, "LOKR": kron, "LORA": plain}[changes["peft_type"]]
    (tmp_path / "in").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, **changes}))
    with pytest.raises(LoraSqueezeError) as caught:
        adapter = peft_methods.load(tmp_path / "in")
        assert "late" in when
        adapter.update("layers.0.q")
    assert "\n" not in str(caught.value)
