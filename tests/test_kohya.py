"""kohya files: what is read is what its readers compute, what is written they all read alike, and the rest is kept."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense, tail
from kohya_cases import (
    CONV,
    HASHES,
    METADATA,
    POINT,
    RANK,
    SHAPES,
    SPELLINGS,
    Q,
    V,
    comfyui,
    kohya_tensors,
    read_kohya,
    sd_scripts,
    write_kohya,
)
from torch import Tensor

from lora_squeeze.adapter import Adapter, Format, Source
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya

MIXED = {Q: 6, V: 4, CONV: 3, POINT: 5}
ALPHAS = {Q: 3.0, V: None, CONV: 0.0, POINT: 7.0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_kohya(tmp_path / "source.safetensors")


def exact(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("alpha", [3.0, None, 1 / 3], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_comfyui_does(tmp_path: Path, spelling: str, alpha: float | None) -> None:
    tensors = kohya_tensors(spelling=spelling, alpha=alpha)
    path = write_kohya(tmp_path / "source.safetensors", tensors)
    adapter = kohya.load(path)
    assert kohya.matches(path)
    assert tuple(adapter.modules) == tuple(sorted(SHAPES))
    assert {m.name: m.kind for m in adapter.modules.values()} == {
        n: "conv" if s[2:] else "linear" for n, s in SHAPES.items()
    }
    for name in SHAPES:
        exact(dense(adapter, name), comfyui(tensors, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("alpha", [3.0, None, 1 / 3, -2.0], ids=str)
@pytest.mark.parametrize("spelling", ["kohya", "PEFT"])
def test_a_copy_has_the_same_bits_and_keys(
    tmp_path: Path, spelling: str, alpha: float | None, dtype: torch.dtype
) -> None:
    before = kohya_tensors(MIXED, alpha, spelling, dtype)
    kohya.load(write_kohya(tmp_path / "source.safetensors", before)).save(tmp_path / "copy.safetensors")
    after, metadata = read_kohya(tmp_path / "copy.safetensors")
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert all(torch.equal(bits(after[key]), bits(before[key])) for key in before)
    kept = {key: value for key, value in METADATA.items() if key not in HASHES}
    assert {key: value for key, value in metadata.items() if key not in ("format", "lora_squeeze")} == kept


def test_alphas_keep_their_dtype_and_shape(tmp_path: Path) -> None:
    before = kohya_tensors()
    for name, alpha in {Q: torch.tensor(3), V: torch.tensor([3.0]), CONV: torch.tensor(49.3).double()}.items():
        before[f"{name}.alpha"] = alpha
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    adapter.save(tmp_path / "copy.safetensors")
    after, _ = read_kohya(tmp_path / "copy.safetensors")
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert dense(adapter, CONV).norm() == pytest.approx(float(comfyui(before, CONV).norm()), rel=1e-12)


@pytest.mark.parametrize("alpha", ["keep", "fold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_squeeze_is_the_best_approximation_in_every_reader(tmp_path: Path, dtype: torch.dtype, alpha: Any) -> None:
    before = kohya_tensors(dtype=dtype)
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    adapter.squeeze(rank=2, alpha=alpha).save(tmp_path / "out.safetensors")
    after, metadata = read_kohya(tmp_path / "out.safetensors")
    assert after.keys() == before.keys()
    scale = 3.0 / RANK if alpha == "keep" else 1.0
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", scale * 2)
    assert metadata["ss_training_comment"] == "kept" and not set(HASHES) & set(metadata)
    for name in SHAPES:
        assert after[f"{name}.alpha"].item() == scale * 2
        assert after[f"{name}.lora_down.weight"].dtype == after[f"{name}.alpha"].dtype == dtype
        whole, cut = comfyui(before, name), comfyui(after, name)
        exact(cut, sd_scripts(after, name))
        lost = tail(whole, 2)
        rounding = 4 * torch.finfo(dtype).eps * float(whole.norm())
        assert lost * (1 - 1e-5) <= float((whole - cut).norm()) <= lost + rounding


@pytest.mark.parametrize("alphas", [ALPHAS, None, 3.0], ids=["some", "none", "all"])
@pytest.mark.parametrize("policy", ["keep", "fold"])
def test_mixed_ranks_and_alphas_are_read_alike_by_all_after_a_squeeze(tmp_path: Path, policy: Any, alphas: Any) -> None:
    before = kohya_tensors(MIXED, alphas)
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    squeezed = adapter.squeeze(energy=0.9, alpha=policy)
    squeezed.save(tmp_path / "out.safetensors")
    after, metadata = read_kohya(tmp_path / "out.safetensors")
    ranks = {name: after[f"{name}.lora_down.weight"].shape[0] for name in SHAPES}
    assert len(set(ranks.values())) > 1, "otherwise the test says nothing"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", f"{max(ranks.values())}")
    for name in SHAPES:
        whole, cut = sd_scripts(before, name), sd_scripts(after, name)
        exact(cut, comfyui(after, name))
        assert after[f"{name}.alpha"].item() != 0
        assert float((whole - cut).norm()) == pytest.approx(tail(whole, ranks[name]), rel=1e-4, abs=1e-6)
    # diffusers takes the alpha of most modules for all of them.
    assert {after[f"{name}.alpha"].item() for name in SHAPES} == {max(ranks.values())}


def test_a_scale_that_all_modules_share_is_kept_at_the_largest_of_mixed_ranks(tmp_path: Path) -> None:
    before = kohya_tensors(MIXED, {name: rank / 4 for name, rank in MIXED.items()})
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    assert adapter.default_scale == 1 / 4
    adapter.squeeze(energy=0.9).save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    largest = max(after[f"{name}.lora_down.weight"].shape[0] for name in SHAPES)
    assert {after[f"{name}.alpha"].item() for name in SHAPES} == {largest / 4}


def test_a_conversion_to_the_same_format_gives_one_alpha(tmp_path: Path) -> None:
    before = kohya_tensors(MIXED, {name: rank / 2 + i for i, (name, rank) in enumerate(MIXED.items())})
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    convert(adapter, "kohya").save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert {after[f"{name}.alpha"].item() for name in SHAPES} == {max(MIXED.values())}
    for name in SHAPES:
        whole = sd_scripts(before, name)
        assert float((sd_scripts(after, name) - whole).norm() / whole.norm()) < 1e-6


def test_an_alpha_that_its_dtype_does_not_hold_is_written_in_a_wider_one(tmp_path: Path) -> None:
    before = kohya_tensors(alpha=2.0, dtype=torch.float16)  # a scale of 1/3
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert after[f"{Q}.alpha"].dtype == torch.float32
    assert after[f"{Q}.alpha"].item() == torch.tensor(2 / 3).item()
    assert after[f"{Q}.lora_up.weight"].dtype == torch.float16


def test_b_makes_up_for_the_digits_that_the_alpha_loses(tmp_path: Path) -> None:
    before = kohya_tensors(alpha=None, dtype=torch.float64) | {f"{n}.alpha": torch.tensor(2.0) for n in SHAPES}
    squeezed = kohya.load(write_kohya(tmp_path / "source.safetensors", before)).squeeze(rank=2)
    squeezed.save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert after[f"{Q}.alpha"].item() != 2 / 3, "float32 does not hold it"
    exact(comfyui(after, Q), dense(squeezed, Q))


def test_an_alpha_of_zero_is_read_as_training_meant_it_and_written_so_that_all_agree(tmp_path: Path) -> None:
    before = kohya_tensors(alpha=ALPHAS)
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", before))
    exact(dense(adapter, CONV), sd_scripts(before, CONV))
    assert not comfyui(before, CONV).any()
    assert any("alpha is 0 in 1 modules" in note for note in adapter.notes)
    adapter.save(tmp_path / "copy.safetensors")
    after, _ = read_kohya(tmp_path / "copy.safetensors")
    assert after[f"{CONV}.alpha"].item() == RANK
    exact(comfyui(after, CONV), sd_scripts(before, CONV))
    assert f"{V}.alpha" not in after, "a copy has the keys of its source"


def test_the_header_stays_silent_about_rank_and_alpha_where_it_was_silent(tmp_path: Path) -> None:
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", metadata={"note": "é \n"}))
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    _, metadata = read_kohya(tmp_path / "out.safetensors")
    assert set(metadata) == {"format", "lora_squeeze", "note"} and metadata["note"] == "é \n"


def test_the_history_names_every_step_and_its_input(tmp_path: Path, source: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    kohya.load(source).squeeze(rank=4).save(first)
    kohya.load(first).squeeze(rank=2).save(second)
    history = kohya.load(second).history
    assert [step["step"] for step in history] == ["post-squeeze", "post-squeeze"]
    assert [step["source_sha256"] for step in history] == [kohya.load(p).source.digest() for p in (source, first)]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_budget_of_bytes_holds_for_the_whole_file(tmp_path: Path, mixed: bool) -> None:
    tensors = kohya_tensors(MIXED if mixed else RANK, None if mixed else 3.0, dtype=torch.float16)
    path = write_kohya(tmp_path / "source.safetensors", tensors | {f"{Q}.diff_b": torch.ones(24)})
    adapter = kohya.load(path)
    fixed = adapter.format.overhead_bytes(adapter) + adapter.extra_bytes
    for share in (0.3, 0.6, 0.9):
        budget = fixed + int(share * adapter.lora_bytes)
        out = tmp_path / f"{share}.safetensors"
        adapter.squeeze(size=budget).save(out)
        assert budget // 2 < out.stat().st_size <= budget


def test_the_bytes_beside_the_factors_stay_below_the_bound_where_alphas_are_added(tmp_path: Path) -> None:
    count = 1000
    tensors = {f"x{i}{suffix}": torch.randn(2, 2).half() for i in range(count) for suffix in SPELLINGS["kohya"]}
    tensors |= {f"y{suffix}": torch.randn(3, 3).half() for suffix in SPELLINGS["kohya"]}
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", tensors))
    squeezed = adapter.squeeze(rank=2)
    squeezed.save(tmp_path / "out.safetensors")
    bound = adapter.format.overhead_bytes(adapter)
    beside = (tmp_path / "out.safetensors").stat().st_size - squeezed.lora_bytes
    assert bound - 8 * count < beside <= bound


def test_a_module_of_rank_zero_leaves_with_its_alpha_unless_other_tensors_stand_beside_it(tmp_path: Path) -> None:
    tensors = kohya_tensors() | {f"{V}.diff_b": torch.ones(12)}
    for name in (Q, V):
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"] * 1e-6
    squeezed = kohya.load(write_kohya(tmp_path / "source.safetensors", tensors)).squeeze(
        rank=2, allocate="global", min_rank=0
    )
    assert squeezed.dropped == (Q,) and V in squeezed.modules
    squeezed.save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert not any(key.startswith(Q) for key in after)
    assert torch.equal(after[f"{V}.diff_b"], tensors[f"{V}.diff_b"])


def test_tensors_beside_the_updates_are_carried_unchanged(tmp_path: Path) -> None:
    beside = {
        "lora_te_norm.w_norm": torch.randn(8),
        "lora_te_norm.b_norm": torch.randn(8),
        "lora_te_norm.alpha": torch.tensor(4.0),
        "lora_unet_norm2.diff": torch.randn(8).half(),
        f"{Q}.diff_b": torch.randn(24).bfloat16(),
        "other.set_weight": torch.randn(2, 3),
        f"{V}.reshape_weight": torch.tensor([12, 20]),
        "bundle_emb.word.string_to_param.*": torch.randn(1, 8),
    }
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", kohya_tensors() | beside))
    assert set(adapter.extras) == set(beside)
    assert {e.kind for e in adapter.extras.values()} == {"other", "bias", "module to save"}
    assert {name for name, module in adapter.modules.items() if module.floor} == {Q, V}
    assert any("sd-scripts and LyCORIS do not beside a LoRA" in note for note in adapter.notes)
    adapter.squeeze(rank=2, dtype=torch.float16).save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert all(torch.equal(after[key], beside[key]) and after[key].dtype == beside[key].dtype for key in beside)


def test_a_bias_of_b_is_carried_where_readers_agree_on_it_and_refused_elsewhere(tmp_path: Path) -> None:
    key = f"{Q}.lora_B.bias"
    tensors = kohya_tensors(alpha=None, spelling="PEFT") | {key: torch.randn(24)}
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", tensors))
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    after, _ = read_kohya(tmp_path / "out.safetensors")
    assert torch.equal(after[key], tensors[key]) and after[f"{Q}.alpha"].item() == 2
    with pytest.raises(LoraSqueezeError, match=r"lora_B.bias'.* alpha / r = 0.5, ComfyUI does not; save .* alpha = r"):
        kohya.load(write_kohya(tmp_path / "scaled.safetensors", tensors | {f"{Q}.alpha": torch.tensor(3.0)}))


def test_reading_is_lazy_and_needs_the_alphas_only(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = kohya.TensorFile.read

    def watched(self: kohya.TensorFile, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(kohya.TensorFile, "read", watched)
    adapter = kohya.load(source)
    assert sorted(read) == sorted(f"{name}.alpha" for name in SHAPES)
    adapter.update(Q)
    assert sorted(read[len(SHAPES) :]) == [f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"]


def test_the_source_is_never_written_and_other_files_only_when_forced(tmp_path: Path, source: Path) -> None:
    adapter, before = kohya.load(source), source.read_bytes()
    link = tmp_path / "link.safetensors"
    os.symlink(source, link)
    for target in (source, link):
        with pytest.raises(LoraSqueezeError, match="is the file that the adapter is read from; choose another output"):
            adapter.save(target, force=True)
    other = tmp_path / "other.safetensors"
    other.write_text("mine")
    with pytest.raises(LoraSqueezeError, match="exists already and nothing was written"):
        adapter.save(other)
    assert source.read_bytes() == before and other.read_text() == "mine"
    adapter.save(other, force=True)
    assert kohya.load(other).rank == RANK


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    tensors = kohya_tensors()
    tensors[f"{POINT}.lora_up.weight"][0] = torch.nan
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", tensors))
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(
        LoraSqueezeError, match=f"{POINT}: the factors hold NaN or infinity, or do not fit in torch.float32"
    ):
        adapter.save(tmp_path / "new" / "out.safetensors")
    with pytest.raises(LoraSqueezeError, match=f"{POINT}: factor B holds NaN"):
        adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == names


def test_progress_ends_at_the_number_of_bytes_announced(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int]] = []
    kohya.load(source).save(tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_the_parts_are_what_the_package_asks_of_a_format(source: Path) -> None:
    adapter: Adapter = kohya.load(source)
    assert isinstance(adapter.format, Format) and isinstance(adapter.source, Source) and adapter.format.name == "kohya"
