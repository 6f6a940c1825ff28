"""LoHa, LoKr, Tucker and full updates: the plain factors are the update itself, of the rank that the shapes allow."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense, tail
from factor_cases import quick
from hypothesis import given
from hypothesis import strategies as st
from kohya_cases import RANK, SHAPES, Q, comfyui, kohya_tensors, read_kohya, sd_scripts, write_kohya
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya, lycoris

X = "lora_unet_mid_block_ff_net_2"
OUT, IN, KERNEL = 12, 10, (3, 3)
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The Tucker product of LyCORIS: a (i, out), b (j, in), core (i, j, *kernel)."""
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def loha(one: int, two: int, kernel: tuple[int, ...] = ()) -> Tensors:
    if not kernel:
        return {
            "hada_w1_a": random(OUT, one), "hada_w1_b": random(one, IN),
            "hada_w2_a": random(OUT, two), "hada_w2_b": random(two, IN),
        }  # fmt: skip
    return {
        "hada_t1": random(one, one, *kernel), "hada_w1_a": random(one, OUT), "hada_w1_b": random(one, IN),
        "hada_t2": random(two, two, *kernel), "hada_w2_a": random(two, OUT), "hada_w2_b": random(two, IN),
    }  # fmt: skip


def lokr(one: int | None, two: int | None, kernel: tuple[int, ...] = (), core: bool = False) -> Tensors:
    """(3 x 2) kron (4 x 5, *kernel), each whole or of a rank."""
    tensors = {"lokr_w1": random(3, 2)} if one is None else {"lokr_w1_a": random(3, one), "lokr_w1_b": random(one, 2)}
    if two is None:
        return tensors | {"lokr_w2": random(4, 5, *kernel)}
    if core:
        return tensors | {
            "lokr_t2": random(two, two, *kernel), "lokr_w2_a": random(two, 4), "lokr_w2_b": random(two, 5),
        }  # fmt: skip
    return tensors | {"lokr_w2_a": random(4, two), "lokr_w2_b": random(two, 5 * math.prod(kernel))}


def definition(t: Tensors) -> Tensor:
    """dW without its scale, (out, in, *kernel) or (out, in * kernel), as LyCORIS defines it."""
    if "diff" in t:
        return t["diff"]
    if "up" in t:
        return torch.einsum("mnhw,om,ni->oihw", t["mid"], t["up"].flatten(1), t["down"].flatten(1))
    if "hada_t1" in t:
        return tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"]) * tucker(
            t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"]
        )
    if "hada_w1_a" in t:
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(w1[(...,) + (None,) * (w2.ndim - 2)], w2.contiguous())


# form, tensors, dims that alpha is divided by, rank that mathematics allows
CASES: dict[str, tuple[str, Any, tuple[int, ...], int]] = {
    "tucker": (
        lycoris.TUCKER,
        lambda: {"up": random(OUT, 3, 1, 1), "down": random(3, IN, 1, 1), "mid": random(3, 3, *KERNEL)},
        (3,),
        3,
    ),
    "loha": (lycoris.LOHA, lambda: loha(3, 3), (3,), 9),
    "loha of two ranks": (lycoris.LOHA, lambda: loha(2, 3), (2,), 6),
    "loha above the smaller side": (lycoris.LOHA, lambda: loha(4, 4), (4,), IN),
    "loha tucker": (lycoris.LOHA, lambda: loha(3, 3, KERNEL), (3,), 9),
    "loha tucker above the smaller side": (lycoris.LOHA, lambda: loha(4, 4, KERNEL), (4,), OUT),
    "lokr": (lycoris.LOKR, lambda: lokr(None, 2), (2,), 4),
    "lokr of two ranks": (lycoris.LOKR, lambda: lokr(1, 2), (1, 2), 2),
    "lokr of one rank": (lycoris.LOKR, lambda: lokr(2, 2), (2,), 4),
    "lokr whole second": (lycoris.LOKR, lambda: lokr(1, None), (1,), 4),
    "lokr whole": (lycoris.LOKR, lambda: lokr(None, None), (), 8),
    "lokr above its sides": (lycoris.LOKR, lambda: lokr(6, 6), (6,), 8),
    "lokr conv": (lycoris.LOKR, lambda: lokr(None, None, KERNEL), (), 8),
    "lokr conv flat": (lycoris.LOKR, lambda: lokr(None, 2, KERNEL), (2,), 4),
    "lokr conv tucker": (lycoris.LOKR, lambda: lokr(None, 2, KERNEL, core=True), (2,), 4),
    "lokr conv tucker of rank 1": (lycoris.LOKR, lambda: lokr(None, 1, KERNEL, core=True), (1,), 2),
    "full tall": (lycoris.FULL, lambda: {"diff": random(OUT, IN)}, (), IN),
    "full wide": (lycoris.FULL, lambda: {"diff": random(IN, OUT)}, (), IN),
    "full conv": (lycoris.FULL, lambda: {"diff": random(OUT, 2, 1, 3)}, (), 6),
}
FILES = [name for name in CASES if name != "lokr of two ranks"]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_the_factors_are_the_update_at_the_rank_that_the_shapes_allow(case: str) -> None:
    form, make, dims, rank = CASES[case]
    tensors = make()
    assert lycoris.form_of(tensors) == form
    facts = lycoris.facts(form, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    dW = definition(tensors)
    assert facts is not None and facts.dims == dims
    assert (facts.out_features, facts.in_features) == dW.flatten(1).shape
    assert facts.kernel == dW.shape[2:]
    B, A = lycoris.factors(form, tensors)
    close(B @ A, dW.flatten(1), 1e-12)
    assert facts.rank == B.shape[1] == A.shape[0] == torch.linalg.matrix_rank(dW.flatten(1)) == rank


@pytest.mark.parametrize("case", CASES)
def test_columns_and_rows_have_like_length_so_that_sixteen_bits_hold_both(case: str) -> None:
    form, make, *_ = CASES[case]
    first = {
        role: tensor * (1e-6 if role in ("diff", "up", "hada_w1_a", "lokr_w1", "lokr_w1_a") else 1)
        for role, tensor in make().items()
    }
    B, A = lycoris.factors(form, first)
    ratio = B.norm(dim=0) / A.norm(dim=1)
    assert 0.49 < float(ratio.min()) <= float(ratio.max()) < 2.01


def test_a_full_difference_is_kept_to_the_last_bit_in_sixteen_bits(tmp_path: Path) -> None:
    diff = (torch.randn(OUT, IN) * 1e-4).half()
    adapter = kohya.load(write_kohya(tmp_path / "full.safetensors", {f"{X}.diff": diff}))
    adapter.save(tmp_path / "plain.safetensors")
    after, _ = read_kohya(tmp_path / "plain.safetensors")
    assert torch.equal(comfyui(after, X), diff.double())


def test_the_singular_values_of_a_lokr_are_the_products_of_those_of_its_parts(tmp_path: Path) -> None:
    tensors = lokr(None, None)
    adapter = kohya.load(write_kohya(tmp_path / "lokr.safetensors", {f"{X}.{k}": t for k, t in tensors.items()}))
    products = torch.outer(torch.linalg.svdvals(tensors["lokr_w1"]), torch.linalg.svdvals(tensors["lokr_w2"]))
    found = adapter.update(X).singular_values()
    close(found, products.flatten().sort(descending=True).values, 1e-9)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_rank_of_a_loha_is_exact_at_any_shape(one: int, two: int, out: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {
        "hada_w1_a": random(out, one), "hada_w1_b": random(one, columns),
        "hada_w2_a": random(out, two), "hada_w2_b": random(two, columns),
    }  # fmt: skip
    facts = lycoris.facts(lycoris.LOHA, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    B, A = lycoris.factors(lycoris.LOHA, tensors)
    assert facts is not None and facts.rank == B.shape[1] == min(one * two, out, columns)
    close(B @ A, definition(tensors), 1e-10)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5])
@pytest.mark.parametrize("case", FILES)
def test_a_file_is_read_with_the_scale_of_its_form_and_squeezed_to_plain_lora(
    tmp_path: Path, case: str, alpha: float | None
) -> None:
    _, make, dims, rank = CASES[case]
    tensors, metadata = make(), {"ss_network_module": "lycoris.kohya", "ss_network_dim": "3", "ss_network_alpha": "1.5"}
    if "up" in tensors:
        tensors = {f"lora_{role}.weight": tensor for role, tensor in tensors.items()}
    file = {f"{X}.{role}": tensor.float() for role, tensor in tensors.items()}
    if alpha is not None:
        file[f"{X}.alpha"] = torch.tensor(alpha)
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", file, metadata))
    whole = definition(make_double(file)).flatten(1) * (alpha / dims[0] if alpha and dims else 1.0)
    assert adapter.modules[X].rank == rank
    close(dense(adapter, X), whole)
    keep = max(1, rank // 2)
    for policy in ("keep", "fold"):
        squeezed = adapter.squeeze(rank=keep, alpha=policy)
        squeezed.save(out := tmp_path / f"{policy}.safetensors")
        after, header = read_kohya(out)
        assert set(after) == {f"{X}.lora_down.weight", f"{X}.lora_up.weight", f"{X}.alpha"}
        assert all(tensor.dtype == torch.float32 for tensor in after.values())
        error = float((comfyui(after, X) - whole).norm())
        assert error == pytest.approx(tail(whole, keep), rel=1e-4, abs=1e-5 * float(whole.norm()))
        scale = adapter.modules[X].scale if policy == "keep" else 1.0
        assert after[f"{X}.alpha"].item() == pytest.approx(scale * keep, rel=1e-6)
        assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == (str(keep), pytest.approx(scale * keep))
        assert squeezed.report.rows[0].energy == pytest.approx(1 - tail(whole, keep) ** 2 / float(whole.norm()) ** 2)
    adapter.save(tmp_path / "copy.safetensors")
    after, _ = read_kohya(tmp_path / "copy.safetensors")
    close(comfyui(after, X), whole)


def make_double(file: Tensors) -> Tensors:
    """Tensors of the one module by role, in float64."""
    roles = {key.removeprefix(f"{X}.").removeprefix("lora_").removesuffix(".weight"): t for key, t in file.items()}
    return {role: tensor.double() for role, tensor in roles.items()}


def test_the_kernel_that_the_file_shows_is_that_of_the_factors_written(tmp_path: Path) -> None:
    for case in ("tucker", "loha tucker", "lokr conv", "lokr conv tucker"):
        _, make, _, _ = CASES[case]
        tensors = make()
        if "up" in tensors:
            tensors = {f"lora_{role}.weight": tensor for role, tensor in tensors.items()}
        path = write_kohya(tmp_path / f"{case}.safetensors", {f"{X}.{role}": t.float() for role, t in tensors.items()})
        adapter = kohya.load(path)
        assert adapter.modules[X].kind == "conv"
        adapter.squeeze(rank=1).save(out := tmp_path / f"{case} out.safetensors")
        after, _ = read_kohya(out)
        assert after[f"{X}.lora_down.weight"].shape[2:] == KERNEL
        assert after[f"{X}.lora_up.weight"].shape[2:] == (1, 1)


def test_a_file_may_mix_forms_and_dtypes(tmp_path: Path) -> None:
    file = kohya_tensors(dtype=torch.bfloat16) | {f"{X}.{role}": t.half() for role, t in loha(3, 3).items()}
    file[f"{X}.alpha"] = torch.tensor(1.5)
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", file))
    assert adapter.default_scale == 0.5, "alpha / r of all: 3 / 6 and 1.5 / 3"
    adapter.squeeze(rank=4).save(tmp_path / "out.safetensors")
    after, header = read_kohya(tmp_path / "out.safetensors")
    assert header["ss_network_dim"] == "4" and float(header["ss_network_alpha"]) == 2.0
    assert after[f"{X}.lora_up.weight"].dtype == torch.float16 and after[f"{Q}.lora_up.weight"].dtype == torch.bfloat16
    for name in SHAPES:
        whole = sd_scripts(file, name)
        assert float((whole - sd_scripts(after, name)).norm()) == pytest.approx(tail(whole, 4), abs=0.02)
    assert adapter.rank == 9 > RANK
    fixed = adapter.format.overhead_bytes(adapter) + adapter.extra_bytes
    adapter.squeeze(size=fixed + adapter.lora_bytes // 3).save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size <= fixed + adapter.lora_bytes // 3


def test_a_scale_below_zero_goes_into_the_factors(tmp_path: Path) -> None:
    file = {f"{X}.{role}": t.float() for role, t in loha(3, 3).items()} | {f"{X}.alpha": torch.tensor(-0.7)}
    kohya.load(write_kohya(tmp_path / "source.safetensors", file)).save(tmp_path / "plain.safetensors")
    after, _ = read_kohya(tmp_path / "plain.safetensors")
    assert after[f"{X}.alpha"].item() == 9
    close(comfyui(after, X), -0.7 / 3 * definition(make_double(file)))


def test_factors_of_a_loha_are_formed_one_module_at_a_time(tmp_path: Path) -> None:
    file = {f"lora_unet_{i}.{role}": t.half() for i in range(3) for role, t in loha(3, 3).items()}
    adapter = kohya.load(write_kohya(tmp_path / "source.safetensors", file))
    for module in adapter.modules.values():
        update = adapter.update(module.name)
        assert update.dtype == torch.float32, "products of 16-bit numbers are exact in it"
        assert module.dtype == torch.float16
        assert module.source_bytes == sum(t.numel() * t.element_size() for t in (update.A, update.B))


@pytest.mark.parametrize("alpha", [3.0, None])
def test_a_lokr_of_two_ranks_is_refused_where_readers_divide_alpha_by_different_ones(
    tmp_path: Path, alpha: float | None
) -> None:
    file = {f"{X}.{role}": tensor for role, tensor in lokr(1, 2).items()}
    if alpha is None:
        close(dense(kohya.load(write_kohya(tmp_path / "a.safetensors", file)), X), definition(make_double(file)), 1e-6)
        return
    path = write_kohya(tmp_path / "b.safetensors", file | {f"{X}.alpha": torch.tensor(alpha)})
    with pytest.raises(LoraSqueezeError, match=r"its two matrices have ranks 1 and 2; ComfyUI .* LyCORIS by the first"):
        kohya.load(path)


def test_notes_say_what_is_converted_and_what_the_file_does_not_show(tmp_path: Path) -> None:
    file = {f"lora_unet_conv1.{role}": t for role, t in loha(2, 2).items()} | {f"{X}.diff": random(OUT, IN)}
    notes = kohya.load(write_kohya(tmp_path / "source.safetensors", file)).notes
    assert any(note == "1 modules are LoHa: written as plain LoRA, their exact rank is up to 4" for note in notes)
    assert any("the energy kept says what a squeeze costs" in note for note in notes)
    assert any("'lora_unet_conv1' may be a convolution, whose kernel is not in the file" in note for note in notes)
