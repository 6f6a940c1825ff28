"""GGUF adapters: what is read is what llama.cpp computes, what is written is read as the same update there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from adapter_cases import tail, write_folder
from factor_cases import quick
from folder_cases import tree
from gguf import GGMLQuantizationType as Kind
from gguf_cases import (
    ALPHA,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    NAMES,
    RANK,
    STACKED,
    definition,
    gguf_tensors,
    read_gguf,
    write_gguf,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import gguf_lora, to_gguf
from lora_squeeze.formats.gguf_names import open_gguf_base

STEPS = "lora_squeeze.history"
ALPHA_KEY = "adapter.lora.alpha"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "source.gguf")


def dense(adapter: Adapter, name: str) -> Tensor:
    """The update that was read, as the base weight has its axes."""
    update = adapter.update(name)
    dW = update.scale * (update.B.double() @ update.A.double())
    return dW.T if name in EMBEDDING else dW


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def with_ranks(ranks: dict[str, int]) -> dict[str, Tensor]:
    """The tensors with some modules cut to their first directions."""
    tensors = gguf_tensors()
    for name, rank in ranks.items():
        a, b = f"{name}.weight.lora_a", f"{name}.weight.lora_b"
        tensors[a] = (tensors[a][:, :rank] if name in EMBEDDING else tensors[a][..., :rank, :]).contiguous()
        tensors[b] = tensors[b][..., :rank].contiguous()
    return tensors


MIXED = {"blk.0.attn_q": 3, "token_embd": 5, "blk.1.ffn_up_exps": 2}


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, None, -3.0], ids=lambda a: f"alpha {a}")
@pytest.mark.parametrize("ranks", [{}, MIXED], ids=["one rank", "mixed ranks"])
def test_every_kind_of_tensor_is_read_as_llama_cpp_computes_it(
    tmp_path: Path, alpha: float | None, ranks: dict[str, int]
) -> None:
    """alpha over the rank of the tensor itself; an alpha of 0, or none, is a scale of 1."""
    path = write_gguf(tmp_path / "a.gguf", with_ranks(ranks), alpha)
    adapter = gguf_lora.load(path)
    assert tuple(adapter.modules) == NAMES and adapter.rank == RANK
    assert {name: m.kind for name, m in adapter.modules.items() if m.kind != "linear"} == {
        "token_embd": "embedding",
        "blk.1.ffn_up_exps": "experts",
    }
    for name, module in adapter.modules.items():
        assert module.rank == ranks.get(name, RANK)
        torch.testing.assert_close(dense(adapter, name), definition(path, name), rtol=1e-12, atol=1e-12)
    assert [note.split(":")[0] for note in adapter.notes] == ["token_embd"]


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, None], ids=lambda a: f"alpha {a}")
@pytest.mark.parametrize("ranks", [{}, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda k: k.name)
def test_a_copy_has_the_same_update_bit_for_bit_and_all_fields(
    tmp_path: Path, kind: Kind, ranks: dict[str, int], alpha: float | None
) -> None:
    source = write_gguf(tmp_path / "source.gguf", with_ranks(ranks), alpha, kind)
    gguf_lora.load(source).save(tmp_path / "copy.gguf")
    (fields, tensors, kinds), (before, expected, _) = read_gguf(tmp_path / "copy.gguf"), read_gguf(source)
    changed = {ALPHA_KEY, STEPS, "general.file_type"}
    assert {k: v for k, v in fields.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    assert fields["general.file_type"] == {Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32}[kind]
    assert list(tensors) == list(expected) and set(kinds.values()) == {kind}
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    for name in NAMES:
        assert torch.equal(definition(tmp_path / "copy.gguf", name), definition(source, name))


def test_an_adapter_of_repeated_layers_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", config=config))
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    with pytest.raises(
        LoraSqueezeError, match=r"layer_replication: .* llama\.cpp would add its updates to other layers"
    ):
        to_gguf.adopt(adapter, open_gguf_base(tmp_path))


@pytest.mark.parametrize("alpha", ["keep", "fold"])
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}], ids=["uniform", "mixed"])
@pytest.mark.parametrize("stored", [ALPHA, None], ids=["alpha 12", "no alpha"])
def test_a_squeeze_is_the_best_approximation_whatever_the_ranks(
    tmp_path: Path, alpha: Any, rule: dict[str, Any], stored: float | None
) -> None:
    source = write_gguf(tmp_path / "source.gguf", alpha=stored)
    squeezed = gguf_lora.load(source).squeeze(alpha=alpha, **rule)
    squeezed.save(tmp_path / "out.gguf")
    fields, tensors, _ = read_gguf(tmp_path / "out.gguf")
    ranks = {name: tensors[f"{name}.weight.lora_b"].shape[-1] for name in NAMES}
    assert ranks == {name: module.rank for name, module in squeezed.modules.items()}
    if "rank" in rule:
        scale = ALPHA / RANK if alpha == "keep" and stored else 1.0
        assert set(ranks.values()) == {3} and fields[ALPHA_KEY] == pytest.approx(3 * scale)
    else:
        assert len(set(ranks.values())) > 1 and fields[ALPHA_KEY] == 0.0
    for name in NAMES:
        before, after = definition(source, name), definition(tmp_path / "out.gguf", name)
        for whole, cut in zip(before, after, strict=True) if name in STACKED else [(before, after)]:
            assert torch.linalg.matrix_rank(cut, rtol=1e-5) == ranks[name]
            assert float((whole - cut).norm()) == pytest.approx(tail(whole, ranks[name]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_asked_for_is_written(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    gguf_lora.load(source).squeeze(rank=4, dtype=dtype).save(tmp_path / "out.gguf")
    fields, _, kinds = read_gguf(tmp_path / "out.gguf")
    kind, file_type = {torch.float16: (Kind.F16, 1), torch.bfloat16: (Kind.BF16, 32)}.get(dtype, (Kind.F32, 0))
    assert set(kinds.values()) == {kind} and fields["general.file_type"] == file_type
    tolerance = torch.finfo(dtype).eps
    for name in LINEAR:
        whole = definition(source, name)
        lost = float((whole - definition(tmp_path / "out.gguf", name)).norm())
        assert lost <= tail(whole, 4) * (1 + 1e-4) + 2 * tolerance * float(whole.norm())


def test_q8_0_is_read_as_the_gguf_package_reads_it_and_written_in_16_bits(tmp_path: Path) -> None:
    """Of lora_b only where the rank is a multiple of 32; the converter writes the rest in float16."""
    tensors = gguf_tensors()
    kinds = {name: Kind.Q8_0 if tensor.shape[-1] % 32 == 0 else Kind.F16 for name, tensor in tensors.items()}
    kinds["blk.0.attn_v.weight.lora_b"] = Kind.F32
    source = write_gguf(tmp_path / "source.gguf", kinds=kinds)
    adapter = gguf_lora.load(source)
    assert {name: m.dtype for name, m in adapter.modules.items()} == {
        **dict.fromkeys(NAMES, torch.float16),
        "blk.0.attn_v": torch.float32,
    }
    for name in NAMES:
        torch.testing.assert_close(dense(adapter, name), definition(source, name), rtol=1e-12, atol=1e-12)
    adapter.save(tmp_path / "copy.gguf")
    for name in NAMES:
        torch.testing.assert_close(
            definition(tmp_path / "copy.gguf", name), definition(source, name), rtol=0.01, atol=0.002
        )
    assert any("q8_0" in note for note in adapter.notes)


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.8}], ids=["rank", "energy"])
def test_permuting_rows_and_squeezing_commute(tmp_path: Path, rule: dict[str, Any]) -> None:
    """Llama's converter reorders the rows of q and k, in the base and in B: nothing has to be undone for a squeeze."""
    heads, half = 4, 3
    tensors = gguf_tensors()
    key = "blk.0.attn_q.weight.lora_b"

    def permuted(rows: Tensor) -> Tensor:
        return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    assert not torch.equal(permuted(tensors[key]), tensors[key])
    plain = write_gguf(tmp_path / "plain.gguf", tensors)
    reordered = write_gguf(tmp_path / "reordered.gguf", {**tensors, key: permuted(tensors[key]).contiguous()})
    for path in (plain, reordered):
        gguf_lora.load(path).squeeze(**rule).save(path.with_suffix(".out"))
    results = [definition(path.with_suffix(".out"), "blk.0.attn_q") for path in (plain, reordered)]
    close(permuted(results[0]), results[1])


@pytest.mark.parametrize("extra", [0, 1, 500, 5000], ids=lambda n: f"smallest+{n}")
@pytest.mark.parametrize("alignment", [None, 64], ids=["alignment 32", "alignment 64"])
def test_a_size_holds_for_the_file(tmp_path: Path, extra: int, alignment: int | None) -> None:
    adapter = gguf_lora.load(write_gguf(tmp_path / "source.gguf", alignment=alignment))
    with pytest.raises(LoraSqueezeError, match="too small: the smallest possible is") as refused:
        adapter.squeeze(size=100)
    smallest = int(str(refused.value).split("the smallest possible is ")[1].split()[0].replace(",", ""))
    adapter.squeeze(size=smallest + extra).save(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").stat().st_size <= smallest + extra
    assert gguf.GGUFReader(tmp_path / "out.gguf").alignment == (alignment or 32)


def test_the_padding_of_many_small_tensors_is_reckoned_with(tmp_path: Path) -> None:
    names = [f"blk.{i}.{t}.weight.lora_{side}" for i in range(100) for t in ("attn_q", "attn_v") for side in "ab"]
    tensors = {name: torch.ones((1, 17) if name.endswith("a") else (33, 1)) for name in names}
    adapter = gguf_lora.load(write_gguf(tmp_path / "source.gguf", tensors))
    adapter.save(tmp_path / "copy.gguf")
    size = (tmp_path / "copy.gguf").stat().st_size
    assert size <= adapter.lora_bytes + adapter.format.overhead_bytes(adapter)
    assert size > adapter.lora_bytes + adapter.format.overhead_bytes(adapter) - 32 * len(tensors), "padding matters"


def test_modules_that_leave_are_in_no_tensor(tmp_path: Path) -> None:
    tensors = gguf_tensors()
    tensors["blk.0.attn_v.weight.lora_b"].zero_()
    gguf_lora.load(write_gguf(tmp_path / "source.gguf", tensors)).squeeze(energy=0.9).save(tmp_path / "out.gguf")
    left = {name.split(".weight.")[0] for name in read_gguf(tmp_path / "out.gguf")[1]}
    assert left == set(NAMES) - {"blk.0.attn_v"}


def test_a_dimension_of_1_may_be_left_out(tmp_path: Path) -> None:
    """As files written by llama.cpp's own code have it for rank 1."""
    tensors = with_ranks(dict.fromkeys(NAMES, 1))
    for name in ("blk.0.attn_q", "output"):
        tensors[f"{name}.weight.lora_a"] = tensors[f"{name}.weight.lora_a"].reshape(-1)
    source = write_gguf(tmp_path / "source.gguf", tensors)
    adapter = gguf_lora.load(source)
    adapter.save(tmp_path / "copy.gguf")
    for name in NAMES:
        assert adapter.modules[name].rank == 1
        close(dense(adapter, name), definition(tmp_path / "copy.gguf", name))


def test_norm_tensors_are_carried_along_and_alpha_0_is_the_answer_to_scales_that_no_alpha_gives(
    source: Path, tmp_path: Path
) -> None:
    norm = torch.arange(32.0)
    path = write_gguf(tmp_path / "norm.gguf", {**gguf_tensors(), "blk.0.attn_norm.weight": norm})
    adapter = gguf_lora.load(path)
    assert any("llama.cpp does not apply" in note for note in adapter.notes)
    scales = {name: 0.5 + i for i, name in enumerate(adapter.modules)}
    mixed = replace(adapter, modules={n: replace(m, scale=scales[n]) for n, m in adapter.modules.items()})
    mixed.save(tmp_path / "out.gguf")
    fields, tensors, _ = read_gguf(tmp_path / "out.gguf")
    assert torch.equal(tensors["blk.0.attn_norm.weight"], norm) and fields[ALPHA_KEY] == 0.0
    for name, scale in scales.items():
        close(definition(tmp_path / "out.gguf", name), definition(path, name) * RANK / ALPHA * scale)


@pytest.mark.parametrize("scale", [1e-46, 1e38, 0.0], ids=["too small", "too large", "zero"])
def test_an_alpha_that_float32_does_not_hold_is_never_written(source: Path, tmp_path: Path, scale: float) -> None:
    """0 would mean a scale of 1."""
    adapter = gguf_lora.load(source)
    changed = {name: replace(module, scale=scale) for name, module in adapter.modules.items()}
    assert gguf_lora.write_alpha(replace(adapter, modules=changed)) == 0.0
    if scale < 1:
        replace(adapter, modules=changed).save(tmp_path / "out.gguf")
        assert max(float(definition(tmp_path / "out.gguf", name).abs().max()) for name in NAMES) <= 1e-30


@quick
@given(
    scale=st.floats(1e-3, 1e3),
    ranks=st.lists(st.integers(1, RANK), min_size=len(NAMES), max_size=len(NAMES)),
    uniform=st.booleans(),
)
def test_what_llama_cpp_makes_of_alpha_is_the_scale_of_every_module(
    tmp_path_factory: pytest.TempPathFactory, scale: float, ranks: list[int], uniform: bool
) -> None:
    adapter = _LOADED.setdefault("adapter", gguf_lora.load(write_gguf(tmp_path_factory.mktemp("g") / "a.gguf")))
    modules = {
        name: replace(module, rank=ranks[0] if uniform else rank, scale=scale)
        for (name, module), rank in zip(adapter.modules.items(), ranks, strict=True)
    }
    alpha = gguf_lora.write_alpha(replace(adapter, modules=modules))
    if uniform or len(set(ranks)) == 1:
        assert all(alpha / module.rank == pytest.approx(scale, rel=1e-7) for module in modules.values())
    else:
        assert alpha == 0.0


_LOADED: dict[str, Adapter] = {}


def test_the_file_tells_what_was_done(source: Path, tmp_path: Path) -> None:
    adapter = gguf_lora.load(source)
    adapter.squeeze(rank=4).save(tmp_path / "one.gguf")
    gguf_lora.load(tmp_path / "one.gguf").squeeze(rank=2).save(tmp_path / "two.gguf")
    steps = gguf_lora.load(tmp_path / "two.gguf").history
    assert [step["rule"] for step in steps] == ["rank=4", "rank=2"]
    assert steps[0]["source_sha256"] == adapter.source.digest()


def test_the_source_and_an_existing_file_are_never_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    adapter = gguf_lora.load(source)
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "there.gguf").write_text("mine")
    before = tree(tmp_path)
    for name, force, text in (
        ("source.gguf", True, "is the file that the adapter is read from"),
        ("link.gguf", True, "is the file that the adapter is read from"),
        ("there.gguf", False, "exists already and nothing was written"),
        (".", True, "is a folder; name the file to be written in it"),
    ):
        with pytest.raises(LoraSqueezeError, match=text):
            adapter.save(tmp_path / name, force=force)
        with pytest.raises(LoraSqueezeError, match=text):
            adapter.format.check_target(tmp_path / name, force=force)
    assert tree(tmp_path) == before
    adapter.save(tmp_path / "there.gguf", force=True)
    close(definition(tmp_path / "there.gguf", "output"), definition(source, "output"))


def nan_in(key: str) -> dict[str, Tensor]:
    tensors = gguf_tensors()
    tensors[key][0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize("squeezed", [True, False], ids=["squeeze", "copy"])
def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, squeezed: bool) -> None:
    adapter = gguf_lora.load(write_gguf(tmp_path / "source.gguf", nan_in("output.weight.lora_b")))
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"^output: .*NaN"):
        (adapter.squeeze(rank=2) if squeezed else adapter).save(tmp_path / "deep" / "er" / "out.gguf")
    assert tree(tmp_path) == before


def test_float64_is_refused_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"holds float32, float16 or bfloat16, not torch\.float64"):
        gguf_lora.load(source).squeeze(rank=2, dtype=torch.float64).save(tmp_path / "out.gguf")
    assert tree(tmp_path) == before


def test_factors_that_do_not_fit_in_16_bits_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors()
    tensors["output.weight.lora_b"] *= 1e6
    adapter = gguf_lora.load(write_gguf(tmp_path / "source.gguf", tensors))
    narrow = replace(adapter, modules={n: replace(m, dtype=torch.float16) for n, m in adapter.modules.items()})
    with pytest.raises(LoraSqueezeError, match=r"^output: .*do not fit in torch.float16; ask for dtype float32"):
        narrow.save(tmp_path / "out.gguf")


Q = "blk.0.attn_q.weight"
U = next(iter(STACKED)) + ".weight"
BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "orphan": ({f"{Q}.lora_b": None}, f"orphan factor '{Q}.lora_a': its partner"),
    "not fitting": ({f"{Q}.lora_a": torch.ones(5, 32)}, f"factors of '{Q}' do not fit: lora_a is [5, 32]"),
    "not transposed": ({f"{Q}.lora_a": torch.ones(32, RANK)}, "expected (r, in) and (out, r)"),
    "experts": ({f"{U}.lora_a": torch.ones(2, RANK, 32)}, f"lora_b is [{EXPERTS}, 20, {RANK}]"),
    "four dimensions": ({f"{Q}.lora_a": torch.ones(1, 1, RANK, 32)}, "lora_a is [1, 1, 8, 32]"),
    "embedding": ({"token_embd.weight.lora_a": torch.ones(RANK, 40)}, "expected (vocabulary, r) and (dim, r)"),
    "empty": ({f"{Q}.lora_a": torch.ones(0, 32), f"{Q}.lora_b": torch.ones(24, 0)}, "one is empty"),
    "unknown": ({"blk.0.attn_q.bias": torch.ones(24)}, "'blk.0.attn_q.bias' (f32) is no factor of a LoRA"),
    "twice": (
        {"blk.0.attn_q.lora_a": torch.ones(2, 4), "blk.0.attn_q.lora_b": torch.ones(4, 2)},
        "two modules have the name 'blk.0.attn_q'",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_of_another_meaning_are_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, text = BAD_TENSORS[case]
    tensors = {key: tensor for key, tensor in {**gguf_tensors(), **changes}.items() if tensor is not None}
    with pytest.raises(LoraSqueezeError) as error:
        gguf_lora.load(write_gguf(tmp_path / "source.gguf", tensors))
    assert text in str(error.value) and str(error.value).startswith(f"'{tmp_path}/source.gguf': ")


TYPES = gguf.GGUFValueType
BAD_FIELDS = {
    "model": (
        {"general.type": ("model", TYPES.STRING)},
        "general.type is 'model', not 'adapter': this is a whole model",
    ),
    "kind": ({"adapter.type": ("control", TYPES.STRING)}, "adapter.type is 'control'; only 'lora' is squeezed"),
    "whole alpha": ({ALPHA_KEY: (16, TYPES.UINT32)}, f"{ALPHA_KEY} is 16; llama.cpp takes a finite number of type"),
    "no number": ({ALPHA_KEY: (float("nan"), TYPES.FLOAT32)}, f"{ALPHA_KEY} is nan; llama.cpp takes a finite number"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_file_that_is_no_lora_is_refused(tmp_path: Path, case: str) -> None:
    fields, text = BAD_FIELDS[case]
    with pytest.raises(LoraSqueezeError) as error:
        gguf_lora.load(write_gguf(tmp_path / "source.gguf", fields=fields))
    assert text in str(error.value)


def test_a_file_without_factors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="no LoRA factors among 1 tensors"):
        gguf_lora.load(write_gguf(tmp_path / "a.gguf", {"blk.0.attn_norm.weight": torch.ones(4)}))
