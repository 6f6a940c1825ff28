"""An adapter beside its base model: names and layouts matched, figures against dense matrices, copies found, lazily."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from adapter_cases import PREFIX, RANK, SHAPES, dense, plain_config, plain_tensors, write_folder
from command_cases import command
from torch import Tensor

import lora_squeeze
from lora_squeeze.base_model import open_base
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.report import Report

INDEX = "model.safetensors.index.json"


def weights(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def plain_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The base weights of the plain adapter, and one that it does not touch."""
    return weights({**{f"{name}.weight": shape for name, shape in SHAPES.items()}, "norm.weight": (20,)}, dtype)


def write_base(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    if shards == 1:
        safetensors.torch.save_file(dict(tensors), folder / "model.safetensors")
        return folder
    files = {
        f"model-{i:05d}-of-{shards:05d}.safetensors": dict(list(tensors.items())[i::shards]) for i in range(shards)
    }
    for name, part in files.items():
        safetensors.torch.save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def beside(
    tmp_path: Path,
    base: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Report:
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    return lora_squeeze.inspect(adapter, base=open_base(write_base(tmp_path / "base", base, shards)))


def expected(dW: Tensor, W: Tensor) -> tuple[float, float, float]:
    """relative_norm, unchanged and merge_error, densely."""
    dW, W = dW.double(), W.double()
    start = W.to(torch.bfloat16).double()
    merged = (start + dW).to(torch.bfloat16).double()
    moved = dW != 0
    share = float((moved & (merged == start)).sum() / moved.sum())
    return float(dW.norm() / W.norm()), share, float((merged - start - dW).norm() / dW.norm())


def check(report: Report, name: str, key: str, dW: Tensor, W: Tensor) -> None:
    found = next(row for row in report.rows if row.name == name).base
    assert found is not None and found.key == key
    assert found.base_norm == pytest.approx(float(W.double().norm()))
    assert (found.relative_norm, found.unchanged, found.merge_error) == pytest.approx(expected(dW, W), rel=1e-4)


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_figures_are_those_of_dense_matrices(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    base = plain_weights(dtype)
    report = beside(tmp_path, base, shards=shards)
    adapter = lora_squeeze.load(tmp_path / "in")
    for name in SHAPES:
        check(report, name, f"{name}.weight", dense(adapter, name), base[f"{name}.weight"])
    assert report.base is not None and report.base.unmatched == {}
    dW2, W2 = (sum(float(t.double().norm()) ** 2 for t in side) for side in
               ([dense(adapter, name) for name in SHAPES], [base[f"{name}.weight"] for name in SHAPES]))  # fmt: skip
    assert report.base.relative_norm == pytest.approx((dW2 / W2) ** 0.5)
    assert not any("not compared" in note for note in report.notes)


@pytest.mark.parametrize(("mine", "theirs"), [("model.a", "a"), ("a", "model.a"), ("model.a", "model.a")])
def test_the_prefix_of_the_body_may_be_there_or_not(tmp_path: Path, mine: str, theirs: str) -> None:
    base = weights({f"{theirs}.q_proj.weight": (6, 5)})
    report = beside(tmp_path, base, plain_tensors({f"{mine}.q_proj": (6, 5)}))
    name = f"{mine}.q_proj"
    check(
        report,
        name,
        f"{theirs}.q_proj.weight",
        dense(lora_squeeze.load(tmp_path / "in"), name),
        next(iter(base.values())),
    )


@pytest.mark.parametrize("square", [True, False])
def test_a_weight_stored_in_by_out_is_turned(tmp_path: Path, square: bool) -> None:
    """GPT-2's Conv1D. Where the shape does not tell, fan_in_fan_out of the configuration does."""
    out, inp = (12, 12) if square else (12, 9)
    base = weights({"h.0.c_attn.weight": (inp, out)})
    config = plain_config(target_modules=["c_attn"], fan_in_fan_out=True)
    report = beside(tmp_path, base, plain_tensors({"h.0.c_attn": (out, inp)}), config)
    dW = dense(lora_squeeze.load(tmp_path / "in"), "h.0.c_attn")
    check(report, "h.0.c_attn", "h.0.c_attn.weight", dW.T, base["h.0.c_attn.weight"])


def test_embeddings_convolutions_and_attention_are_found_in_their_layout(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(2)
    shapes = {
        "embed_tokens.lora_embedding_A": (RANK, 30),
        "embed_tokens.lora_embedding_B": (9, RANK),
        "conv.lora_A.weight": (RANK, 3, 3, 3),
        "conv.lora_B.weight": (6, RANK // 2, 1, 1),  # two groups
        "attn.lora_A.weight": (RANK, 9),
        "attn.lora_B.weight": (27, RANK),
    }
    tensors = {PREFIX + name: torch.randn(shape, generator=g) / 100 for name, shape in shapes.items()}
    base = weights({"embed_tokens.weight": (30, 9), "conv.weight": (6, 3, 3, 3), "attn.in_proj_weight": (27, 9)})
    config = plain_config(target_modules=["embed_tokens", "conv", "attn"])
    report = beside(tmp_path, base, tensors, config)
    adapter = lora_squeeze.load(tmp_path / "in")
    check(report, "embed_tokens", "embed_tokens.weight", dense(adapter, "embed_tokens").T, base["embed_tokens.weight"])
    check(report, "conv", "conv.weight", dense(adapter, "conv").reshape(6, 3, 3, 3), base["conv.weight"])
    check(report, "attn", "attn.in_proj_weight", dense(adapter, "attn"), base["attn.in_proj_weight"])


@pytest.mark.parametrize("turned", [True, False])
def test_stacked_experts_are_found_either_way_round(tmp_path: Path, turned: bool) -> None:
    g = torch.Generator().manual_seed(3)
    tensors = {
        f"{PREFIX}mlp.experts.lora_A.weight": torch.randn(3 * RANK, 7, generator=g) / 30,
        f"{PREFIX}mlp.experts.lora_B.weight": torch.randn(5, 3 * RANK, generator=g) / 30,
    }
    base = weights({"mlp.experts.gate_up_proj": (3, 7, 5) if turned else (3, 5, 7)})
    report = beside(tmp_path, base, tensors, plain_config(target_parameters=["experts.gate_up_proj"]))
    name = "mlp.experts.gate_up_proj"
    dW = dense(lora_squeeze.load(tmp_path / "in"), name)
    check(report, name, name, dW.mT if turned else dW, base[name])


def test_square_experts_get_a_size_but_no_merge(tmp_path: Path) -> None:
    """The file does not tell which axis is which."""
    g = torch.Generator().manual_seed(3)
    tensors = {
        f"{PREFIX}mlp.experts.lora_A.weight": torch.randn(3 * RANK, 6, generator=g),
        f"{PREFIX}mlp.experts.lora_B.weight": torch.randn(6, 3 * RANK, generator=g),
    }
    base = weights({"mlp.experts.w2": (3, 6, 6)})
    report = beside(tmp_path, base, tensors, plain_config(target_parameters=["experts.w2"]))
    found = report.rows[0].base
    assert found is not None and (found.unchanged, found.merge_error) == (None, None)
    assert found.relative_norm == pytest.approx(report.rows[0].norm / float(base["mlp.experts.w2"].double().norm()))


def test_an_update_below_the_rounding_of_its_weight_is_named(tmp_path: Path) -> None:
    base = plain_weights()
    base["layers.0.v_proj.weight"] *= 1e5
    report = beside(tmp_path, base)
    lost = next(row.base for row in report.rows if row.name == "layers.0.v_proj")
    assert lost is not None and lost.unchanged is not None and lost.unchanged > 0.9
    note = next(note for note in report.notes if "below bf16 rounding" in note)
    assert re.fullmatch(
        r"layers\.0\.v_proj: this update is below bf16 rounding of the base weight \(\d+ % of the entries stay as they "
        r"are\): merging into bf16 loses most of it; serve it unmerged, or merge in float32",
        note,
    )


def test_a_plan_leaves_the_figures_beside_the_base_those_of_the_source(tmp_path: Path) -> None:
    base = open_base(write_base(tmp_path / "base", plain_weights()))
    adapter = lora_squeeze.load(write_folder(tmp_path / "in"))
    plain, planned = (lora_squeeze.inspect(adapter, base=base, **more) for more in ({}, {"rank": 2}))
    assert [row.base for row in plain.rows] == [row.base for row in planned.rows]


# --- what cannot be compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda W: None, "no tensor of that name in it"),
        (lambda W: W.to(torch.uint8), r"stored as uint8 in it \(quantised\)"),
        (lambda W: W[:-1], r"its shape is \[7, 20\] in it, the update's \[8, 20\]"),
        (lambda W: W * torch.nan, "NaN or infinity in it"),
        (lambda W: W * 0, "all zeros in it"),
    ],
)
def test_what_is_not_compared_is_told_with_the_reason(tmp_path: Path, change: Any, reason: str) -> None:
    base = plain_weights()
    changed = change(base.pop("layers.0.v_proj.weight"))
    if changed is not None:
        base["layers.0.v_proj.weight"] = changed.contiguous()
    report = beside(tmp_path, base)
    assert [row.name for row in report.rows if row.base is None] == ["layers.0.v_proj"]
    assert report.base is not None and list(report.base.unmatched) == ["layers.0.v_proj"]
    assert any(re.fullmatch(rf"not compared with the base, {reason}: layers\.0\.v_proj", note) for note in report.notes)


def test_a_model_of_other_names_leaves_the_report_whole(tmp_path: Path) -> None:
    report = beside(tmp_path, {"wte": torch.ones(2, 2)})
    assert report.base is not None and report.base.relative_norm is None
    assert set(report.base.unmatched) == set(SHAPES)
    assert report.notes[-1].endswith("layers.0.q_proj, layers.0.v_proj, layers.1.down_proj and 1 more")
    json.dumps(report.inspection(), allow_nan=False)


# --- tensors carried along ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_of_the_base_can_be_dropped(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where the adapter has it in another dtype than the base."""
    embedding = torch.randn(40, 20).to(torch.bfloat16)
    key = f"{PREFIX}model.embed_tokens.weight"
    base = plain_weights() | {"model.embed_tokens.weight": embedding.float()}
    report = beside(tmp_path, base, plain_tensors() | {key: embedding.to(dtype)})
    assert report.base is not None
    (found,) = report.base.carried
    assert (found.name, found.key, found.rows, found.equal) == (key, "model.embed_tokens.weight", 40, True)
    size = 40 * 20 * dtype.itemsize
    assert found.size_bytes == size
    assert f"{key} ({size:,} bytes): equal to the base: can be dropped" in report.notes


def test_changed_and_added_rows_are_counted(tmp_path: Path) -> None:
    embedding = torch.randn(40, 20)
    changed = torch.cat([embedding, torch.ones(3, 20)])
    changed[[4, 7]] += 1
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    base = plain_weights() | {"embed_tokens.weight": embedding}
    report = beside(tmp_path, base, plain_tensors() | {key: changed})
    assert report.base is not None
    (found,) = report.base.carried
    assert (found.rows, found.changed_rows, found.added_rows, found.equal) == (43, 2, 3, False)
    assert any(note.endswith("2 of 43 rows changed, 3 added, the rest equals the base") for note in report.notes)
    assert report.inspection()["base"]["carried"][0]["equal"] is False


def test_a_head_that_the_base_ties_is_compared_with_the_embedding(tmp_path: Path) -> None:
    embedding = torch.randn(40, 20)
    base = plain_weights() | {"model.embed_tokens.weight": embedding}
    report = beside(tmp_path, base, plain_tensors() | {f"{PREFIX}lm_head.weight": embedding.clone()})
    assert report.base is not None
    assert [(t.key, t.equal) for t in report.base.carried] == [("model.embed_tokens.weight", True)]


def test_a_carried_tensor_of_another_shape_is_not_compared(tmp_path: Path) -> None:
    base = plain_weights() | {"lm_head.weight": torch.ones(40, 10)}
    report = beside(tmp_path, base, plain_tensors() | {f"{PREFIX}lm_head.weight": torch.ones(40, 20)})
    assert report.base is not None and report.base.carried == []
    reason = "its shape is [40, 10] in it, the adapter's [40, 20]"
    assert report.base.unmatched == {f"{PREFIX}lm_head.weight": reason}


# --- the files ------------------------------------------------------------------------------------------------------


def test_only_what_is_compared_is_read_and_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", plain_weights(), shards=2)
    adapter = lora_squeeze.load(write_folder(tmp_path / "in"))
    read: list[str] = []
    pieces = TensorFile.pieces

    def spy(self: TensorFile, name: str) -> Iterator[Tensor]:
        read.append(name)
        return pieces(self, name)

    monkeypatch.setattr(TensorFile, "pieces", spy)
    opened = open_base(base)
    assert read == [] and len(opened.facts) == len(SHAPES) + 1
    steps: list[tuple[int, int]] = []
    lora_squeeze.inspect(adapter, lambda done, total: steps.append((done, total)), base=opened)
    assert sorted(read) == sorted(f"{name}.weight" for name in SHAPES)
    size = sum(2 * out * inp for out, inp in SHAPES.values())
    assert steps[-1] == (size, size)


def test_a_folder_with_one_file_of_any_name_will_do(tmp_path: Path) -> None:
    (write_base(tmp_path / "base", plain_weights()) / "model.safetensors").rename(tmp_path / "base" / "x.safetensors")
    assert len(open_base(tmp_path / "base").facts) == len(SHAPES) + 1


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda f: None, "no safetensors; expected model.safetensors, or shards with"),
        (lambda f: [(f / f"{n}.safetensors").touch() for n in "ab"], "2 safetensors files and no index that"),
        (lambda f: (f / INDEX).write_text("{"), "no readable index of shards"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'), "'b.safetensors' is missing"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../b"}}'), "names '../b', which is no file beside it"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "names '3', which is no file beside it"),
        (lambda f: (f / "model.safetensors").write_text("<html>"), "web page saved in place of weights"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_read_is_refused(tmp_path: Path, prepare: Any, text: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(LoraSqueezeError, match=re.escape(text)):
        open_base(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no/such/folder", "no such folder, and not the form of a hub id"),
        ("file", "expected the folder of a base model"),
    ],
)
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoraSqueezeError, match=text):
        open_base(tmp_path / name)


def test_a_hub_id_fetches_the_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "cache", plain_weights())
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = open_base("user/model", revision="v1")
    assert base.name == "user/model" and set(base.facts) == set(plain_weights())
    assert (asked["repository"], asked["revision"]) == ("user/model", "v1")
    assert all(".safetensors" in pattern for pattern in asked["allow_patterns"])


def test_the_command_shows_what_the_library_finds(tmp_path: Path) -> None:
    base = plain_weights()
    base["layers.0.v_proj.weight"] *= 1e5
    report = beside(tmp_path, base)
    table, data = (
        command(tmp_path, "inspect", tmp_path / "in", "--base", tmp_path / "base", *more) for more in ((), ("--json",))
    )
    found = json.loads(data.out)
    assert found["base"]["model"] == str(tmp_path / "base") and found["base"]["unmatched"] == {}
    assert found["modules"] == report.inspection()["modules"] and found["notes"] == report.notes
    assert "of the weight" in table.out and "lost in bf16" in table.out
    assert "merging into bf16 loses most of it" in table.out
    run = command(tmp_path, "inspect", tmp_path / "in", "--base", tmp_path / "none")
    assert (run.code, run.out) == (1, "") and "no such folder" in run.err
