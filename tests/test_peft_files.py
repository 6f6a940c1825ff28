"""Files as PEFT and others leave them: spellings, places, dtypes; and what a squeeze writes beside the factors."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_cases import CASES, LAYERS, llama, mixtral, qwen_moe, tokens
from peft_models import (
    CONFIG,
    WEIGHTS,
    Case,
    Menagerie,
    adapted,
    best,
    deltas,
    layers,
    lost,
    outputs,
    randomise,
    read_config,
    reload,
    save,
    scales,
    seeded,
    tensors,
    write_config,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lora_squeeze

CARD = "README.md"


def plain(**config: object) -> Case:
    return Case(llama, {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **config}, tokens)


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def history(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(metadata(folder)["lora_squeeze"])
    return found


def assert_squeezed(case: Case, source: PeftModel, folder: Path, rank: int) -> None:
    """PEFT finds the best updates of this rank in the folder."""
    found = deltas(reload(case, folder))
    for name, dW in deltas(source).items():
        torch.testing.assert_close(found[name], best(dW, rank), rtol=1e-4, atol=1e-6)


def _named(key: str) -> str:
    return key.replace(".weight", ".default.weight").replace(".bias", ".default.bias")


def _embedding_named(key: str) -> str:
    return f"{key}.default" if "lora_embedding" in key else key.replace(".weight", ".default.weight")


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("linear", _named),
        ("lora bias", _named),
        ("embedding", _embedding_named),
        ("convolutions", _named),
        ("linear", lambda key: key.removeprefix("base_model.model.")),
        ("lora bias", lambda key: key.removeprefix("base_model.model.")),
        ("head to save", lambda key: key.removeprefix("base_model.model.")),
        ("bias all", lambda key: key.removeprefix("base_model.model.")),
        ("attention module", lambda key: _named(key.removeprefix("base_model.model."))),
    ],
)
def test_old_spellings_come_out_as_peft_writes_today(
    menagerie: Menagerie, tmp_path: Path, name: str, spelling: Callable[[str], str]
) -> None:
    source = menagerie.source(name)
    old = {spelling(key): tensor for key, tensor in tensors(source.folder).items()}
    assert old.keys() != tensors(source.folder).keys()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG).write_text((source.folder / CONFIG).read_text())
    save_file(old, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    lora_squeeze.load(tmp_path / "old").squeeze(rank=source.case.rank).save(tmp_path / "out")
    found, expected = tensors(tmp_path / "out"), tensors(menagerie.squeezed(name, "keep").folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", ["linear", "convolutions", "embedding", "experts", "lora bias", "trained tokens"])
def test_a_pickle_gives_the_same_as_safetensors(menagerie: Menagerie, tmp_path: Path, name: str) -> None:
    source = menagerie.source(name)
    save(adapted(source.case), tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin" / WEIGHTS).exists()
    lora_squeeze.load(tmp_path / "bin").squeeze(rank=source.case.rank).save(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.bin").exists()
    found, expected = tensors(tmp_path / "out"), tensors(menagerie.squeezed(name, "keep").folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    digest = hashlib.sha256((tmp_path / "bin" / "adapter_model.bin").read_bytes()).hexdigest()
    assert history(tmp_path / "out")[-1]["source_sha256"] == digest


def test_an_adapter_saved_under_a_name_is_in_a_folder_of_that_name(tmp_path: Path) -> None:
    case = plain()
    model = adapted(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
        model.set_adapter("other")
        randomise(model, 0.3)
    save(model, tmp_path / "source")
    other = lora_squeeze.load(tmp_path / "source", subfolder="other")
    assert len(other.modules) == 2 and other.rank == 4
    other.squeeze(rank=2).save(tmp_path / "out")
    assert_squeezed(case, reload(case, tmp_path / "source" / "other"), tmp_path / "out", 2)
    with pytest.raises(lora_squeeze.LoraSqueezeError, match=r"no adapter_config\.json"):
        lora_squeeze.load(tmp_path / "source", subfolder="another")


def test_a_weights_file_stands_for_its_folder(menagerie: Menagerie) -> None:
    folder = menagerie.source("linear").folder
    for name in (WEIGHTS, CONFIG):
        assert lora_squeeze.load(folder / name).modules.keys() == lora_squeeze.load(folder).modules.keys()


def test_transformers_own_adapters_both_ways(tmp_path: Path) -> None:
    """model.add_adapter and model.save_pretrained, without a PeftModel; and model.load_adapter of the result."""
    case = plain()
    model = seeded(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(LoraConfig(**case.config))
        randomise(model)
        model.save_pretrained(tmp_path / "source")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=3).save(tmp_path / "out")
    assert_squeezed(case, reload(case, tmp_path / "source"), tmp_path / "out", 3)
    loaded = seeded(llama)
    loaded.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(outputs(loaded.double(), case), outputs(reload(case, tmp_path / "out"), case))


# Models that had a list of three linear layers per expert: where the list was, and the names of the three.
OLD_EXPERTS: dict[str, tuple[Case, str, list[str]]] = {
    "mixtral": (
        Case(mixtral, {"target_parameters": ["experts"]}, tokens), "block_sparse_moe.experts", ["w1", "w3", "w2"]
    ),
    "qwen": (
        Case(qwen_moe, {"target_parameters": ["experts"]}, tokens),
        "mlp.experts",
        ["gate_proj", "up_proj", "down_proj"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=OLD_EXPERTS)
def old_experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """An adapter of the time when every expert was three linear layers; PEFT fuses them on loading."""
    case, place, names = OLD_EXPERTS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "source"
    save(adapted(Case(case.base, dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"]), tokens)), folder)
    factors, generator = tensors(folder), torch.Generator().manual_seed(4)
    inner = seeded(case.base).get_parameter("model.layers.0.mlp.experts.down_proj").shape[-1]
    for layer in range(2):
        for expert in range(4):
            for name, (rows, columns) in zip(names, [(inner, 16), (inner, 16), (16, inner)], strict=True):
                key = f"base_model.model.model.layers.{layer}.{place}.{expert}.{name}"
                factors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 5
                factors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 5
    save_file(factors, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, target_modules=["q_proj", "k_proj", *names])
    return case, folder


@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_experts_that_peft_fuses_are_unchanged_at_full_rank(
    old_experts: tuple[Case, Path], tmp_path: Path, alpha: str
) -> None:
    case, folder = old_experts
    lora_squeeze.load(folder).squeeze(rank=1000, alpha=alpha).save(tmp_path / "out")
    expected = outputs(reload(case, folder), case)
    torch.testing.assert_close(outputs(reload(case, tmp_path / "out"), case), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [dict(rank=2), dict(energy=0.7), dict(params=3000), dict(rank=2, alpha="fold")])
def test_experts_that_peft_fuses_get_one_rank(
    old_experts: tuple[Case, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Fused, gate and up have twice the rank: dW is the two best updates above each other."""
    case, folder = old_experts
    small = lora_squeeze.load(folder).squeeze(**options)
    small.save(tmp_path / "out")
    (rank,) = {module.rank for module in small.modules.values()}
    assert rank < 4 and read_config(tmp_path / "out")["rank_pattern"] == {}
    before, after = reload(case, folder), reload(case, tmp_path / "out")
    assert len(scales(after)) == 1
    for name, layer in layers(after).items():
        fused = name.endswith("gate_up_proj")
        assert layer.r["default"] == (2 * rank if fused else rank)
        halves = deltas(before)[name].chunk(2, -2) if fused else (deltas(before)[name],)
        expected = torch.cat([best(half, rank) for half in halves], -2)
        torch.testing.assert_close(deltas(after)[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1000, 4, 2])
def test_experts_that_peft_has_fused_and_saved_again(old_experts: tuple[Case, Path], tmp_path: Path, rank: int) -> None:
    """Rank 2 r in rank_pattern and bare parameter names in the configuration: the fused update is one matrix now."""
    case, folder = old_experts
    save(reload(case, folder).float(), tmp_path / "fused")
    assert sorted(read_config(tmp_path / "fused")["target_parameters"]) == ["down_proj", "gate_up_proj"]
    small = lora_squeeze.load(tmp_path / "fused").squeeze(rank=rank)
    small.save(tmp_path / "out")
    before, after = deltas(reload(case, folder)), deltas(reload(case, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, dW in before.items():
        torch.testing.assert_close(after[name], best(dW, rank), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "convolutions", "embedding", "experts"])
def test_a_dtype_is_kept_and_its_rounding_is_small(
    menagerie: Menagerie, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """The factors of 16 bits carry rounding errors of their own, which the report knows.

    Both parts are orthogonal to first order: rounding moves B' A' within the kept directions, the tail has none.
    """
    source = menagerie.source(name)
    cast = {key: tensor.to(dtype) for key, tensor in tensors(source.folder).items()}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / CONFIG).write_text((source.folder / CONFIG).read_text())
    save_file(cast, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    small = lora_squeeze.load(tmp_path / "source").squeeze(rank=source.case.rank)
    small.save(tmp_path / "out")
    assert {tensor.dtype for key, tensor in tensors(tmp_path / "out").items()} == {dtype}
    before, after = (deltas(reload(source.case, tmp_path / folder)) for folder in ("source", "out"))
    for row in small.report.rows:
        error = float((before[row.name] - after[row.name]).norm())
        tail, rounding = lost(before[row.name], source.case.rank), row.rounding or 0.0
        assert (row.rounding is None) == (dtype == torch.float32)
        assert rounding <= 2 * torch.finfo(dtype).eps * row.norm
        assert abs(error**2 - tail**2 - rounding**2) <= 1e-5 * tail**2 + 0.2 * rounding**2, row.name
        assert tail - 1e-5 * row.norm <= error, "no rank-k matrix is nearer"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_can_be_asked_for(menagerie: Menagerie, tmp_path: Path, dtype: torch.dtype) -> None:
    source = menagerie.source("head to save")
    source.adapter.squeeze(rank=1000, dtype=dtype).save(tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for key, tensor in found.items() if "lora_" in key} == {dtype}
    assert found["base_model.model.score.weight"].dtype == torch.float32, "what is carried along stays"
    eps = max(torch.finfo(dtype).eps, 1e-6)
    after = reload(source.case, tmp_path / "out")
    torch.testing.assert_close(outputs(after, source.case), outputs(source.model, source.case), rtol=0, atol=8 * eps)


@pytest.mark.parametrize("name", [*LAYERS, "lora bias", "rslora and patterns", "tied embedding and head"])
def test_squeezing_in_two_steps_is_squeezing_once(menagerie: Menagerie, tmp_path: Path, name: str) -> None:
    source = menagerie.source(name)
    steps = 4 if name != "grouped convolution" else 2
    source.adapter.squeeze(rank=steps, alpha="fold").save(tmp_path / "half")
    lora_squeeze.load(tmp_path / "half").squeeze(rank=2).save(tmp_path / "twice")
    source.adapter.squeeze(rank=2, alpha="fold").save(tmp_path / "once")
    twice, once = (deltas(reload(source.case, tmp_path / folder)) for folder in ("twice", "once"))
    assert twice.keys() == once.keys()
    for layer in once:
        torch.testing.assert_close(twice[layer], once[layer], rtol=1e-4, atol=1e-5)
    assert [step["source_sha256"] for step in history(tmp_path / "twice")] == [
        hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in (source.folder, tmp_path / "half")
    ]


def test_the_header_says_what_was_done_and_stays_a_header_of_pytorch(menagerie: Menagerie, tmp_path: Path) -> None:
    source = menagerie.source("linear")
    assert metadata(source.folder) == {"format": "pt"}
    source.adapter.squeeze(energy=0.9, method="qr", max_rank=6).save(tmp_path / "out")
    found = metadata(tmp_path / "out")
    assert found["format"] == "pt"
    (step,) = json.loads(found["lora_squeeze"])
    assert step["rule"] == "energy=0.9" and step["method"] == "qr" and step["alpha"] == "keep"
    assert step["lora_squeeze"] == lora_squeeze.__version__


def test_strings_of_the_source_header_are_kept(menagerie: Menagerie, tmp_path: Path) -> None:
    source = menagerie.source("linear")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / CONFIG).write_text((source.folder / CONFIG).read_text())
    save_file(tensors(source.folder), tmp_path / "source" / WEIGHTS, metadata={"format": "pt", "author": "A. N. Other"})
    lora_squeeze.load(tmp_path / "source").squeeze(rank=2).save(tmp_path / "out")
    assert metadata(tmp_path / "out")["author"] == "A. N. Other"


def test_the_model_card_is_kept_and_the_section_replaced(tmp_path: Path) -> None:
    save(adapted(plain()), tmp_path / "source")
    card = (tmp_path / "source" / CARD).read_text()
    assert "library_name: peft" in card, "PEFT writes a card"
    (tmp_path / "source" / CARD).write_text(card + "\n## Our notes\n\nTrained on 3 × 4 examples — carefully.\n")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=4).save(tmp_path / "half")
    lora_squeeze.load(tmp_path / "half").squeeze(rank=2).save(tmp_path / "out")
    for folder, rank in (("half", 4), ("out", 2)):
        text = (tmp_path / folder / CARD).read_text(encoding="utf-8")
        assert text.startswith(card.rstrip()[:40])
        assert "Trained on 3 × 4 examples — carefully." in text
        assert text.count("## Squeezed with lora-squeeze") == 1 and "Truncated by singular values." in text
        assert re.search(rf"rank: {rank} in 4 modules", text)
    assert not re.search(r"rank: 4 in", (tmp_path / "out" / CARD).read_text())


def test_the_model_card_says_what_was_done_last(tmp_path: Path) -> None:
    source = lora_squeeze.load(save(adapted(plain()), tmp_path / "source"))
    done = {"Merged": lora_squeeze.merge([source, source]), "Padded": lora_squeeze.rank_up(source, 30)}
    for title, adapter in {**done, "Converted": lora_squeeze.convert(source, "peft"), "Written": source}.items():
        adapter.save(tmp_path / title)
        text = (tmp_path / title / CARD).read_text()
        assert f"## {title} with lora-squeeze" in text and "Truncated" not in text


def test_an_adapter_without_a_card_gets_one(tmp_path: Path) -> None:
    save(adapted(plain()), tmp_path / "source")
    write_config(tmp_path / "source", base_model_name_or_path="someone/base")
    (tmp_path / "source" / CARD).unlink()
    lora_squeeze.load(tmp_path / "source").squeeze(rank=4).save(tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text()
    assert text.startswith("---\n") and 'base_model: "someone/base"' in text


def test_saving_is_bitwise_repeatable(menagerie: Menagerie, tmp_path: Path) -> None:
    for name in ("linear", "experts", "convolutions"):
        for run in ("a", "b"):
            lora_squeeze.load(menagerie.source(name).folder).squeeze(rank=2).save(tmp_path / name / run)
        for file in (WEIGHTS, CONFIG, CARD):
            assert (tmp_path / name / "a" / file).read_bytes() == (tmp_path / name / "b" / file).read_bytes()


def test_the_saved_factors_are_those_that_update_gives(menagerie: Menagerie) -> None:
    """What the library computes in memory is what PEFT reads from the file."""
    for name in ("linear", "experts", "embedding"):
        small = menagerie.squeezed(name, "fold")
        for layer, dW in deltas(small.model).items():
            found: Tensor = small.adapter.update(layer).dense().double()
            found = found if found.dim() == 3 else found.unsqueeze(0)
            expected = dW.mT if CASES[name].config.get("fan_in_fan_out") or "words" in layer else dW
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
