"""WaRA: the wavelets are orthonormal, and the update is what the paper's transforms of tokens and features come to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net, shake
from peft import LoraConfig, WaveFTConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters import WaraConfig
from lora_squeeze.methods.adapters.wara import bands_of, from_bands, scaling_filter

WARA = METHODS["wara"]
IN, OUT, R = 12, 20, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "haar": {},
    "haar-packets": {"levels": 2},
    "db2": {"wavelet": "db2"},
    "db3-packets": {"wavelet": "db3", "levels": 2},
    "separate": {"bands": "separate", "wavelet": "db2"},
    "tiny": {"tiny": True, "wavelet": "db2"},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def one_layer(columns: int = IN, rows: int = OUT, **settings: Any) -> Any:
    """A trained WaRA layer in float64 around a linear one without bias."""
    with drawn_from(0):
        model = nn.ModuleDict({"only": nn.Linear(columns, rows, bias=False)}).double()
    found = get_peft_model(model, WaraConfig(**{"target_modules": ["only"], "r": R, "alpha": 6, **settings}))
    shake(found)
    return found.base_model.model["only"].double()


def delta_of(layer: Any) -> Any:
    return layer.deltas["default"]


def update(layer: Any, x: Tensor) -> Tensor:
    """What the layer adds to the base, by its forward pass."""
    found: Tensor = layer(x) - layer.get_base_layer()(x)
    return found


def transform(d: int, wavelet: str, levels: int = 1) -> Tensor:
    """The bands (n, d / n, d) of one level, by the definition; deeper ones split each band again."""
    low = torch.tensor(scaling_filter(wavelet), dtype=torch.float64)
    high = low.flip(0) * torch.tensor([(-1.0) ** k for k in range(len(low))], dtype=torch.float64)
    bands = torch.zeros(2, d // 2, d, dtype=torch.float64)
    for band, taps in enumerate((low, high)):
        for row in range(d // 2):
            for place, tap in enumerate(taps):
                bands[band, row, (2 * row + place) % d] += tap
    return bands if levels == 1 else torch.cat([transform(d // 2, wavelet, levels - 1) @ half for half in bands])


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("wavelet", ["haar", *(f"db{n}" for n in range(1, 11))])
def test_the_filters_are_daubechies(wavelet: str) -> None:
    """Orthonormal under even shifts, and the high-pass half is blind to polynomials below its order."""
    taps = scaling_filter(wavelet)
    order = len(taps) // 2
    assert wavelet == "haar" or order == int(wavelet[2:])
    for shift in range(0, len(taps), 2):
        product = sum(a * b for a, b in zip(taps[shift:], taps[: len(taps) - shift], strict=True))
        assert abs(product - (shift == 0)) < 1e-7
    for power in range(order):
        moments = [(-1) ** k * tap * k**power for k, tap in enumerate(taps)]
        assert abs(math.fsum(moments)) < 1e-6 * sum(map(abs, moments))


def test_the_second_filter_in_closed_form() -> None:
    root = math.sqrt(3)
    wanted = [(1 + root), (3 + root), (3 - root), (1 - root)]
    for found, tap in zip(scaling_filter("db2"), wanted, strict=True):
        assert abs(found - tap / (4 * math.sqrt(2))) < 1e-12


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize("d", [4, 12, 16])
def test_the_transform_is_the_matrix_and_orthonormal(d: int, wavelet: str, levels: int) -> None:
    """Also where the filter is longer than the features."""
    wanted = transform(d, wavelet, levels)
    low = scaling_filter(wavelet)
    x = numbers(5, d)
    torch.testing.assert_close(bands_of(x, low, levels), torch.einsum("bkd,td->tbk", wanted, x))
    torch.testing.assert_close(from_bands(bands_of(x, low, levels), low, levels), x)
    flat = wanted.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("d", [7, 9, 13])
def test_features_that_do_not_divide_are_filled_up_with_zeros(d: int) -> None:
    x, low = numbers(5, d), scaling_filter("db2")
    whole = from_bands(bands_of(x, low, 2), low, 2)
    assert whole.shape[-1] == math.ceil(d / 4) * 4
    torch.testing.assert_close(whole, functional.pad(x, (0, whole.shape[-1] - d)))


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("levels", [1, 2])
def test_it_is_the_transform_over_features_and_tokens_with_one_map(wavelet: str, levels: int) -> None:
    """The paper's figure: both transforms, the same map on all bands, both back."""
    layer = one_layer(wavelet=wavelet, levels=levels)
    M = 6 / R * delta_of(layer).B[0] @ delta_of(layer).A[0]
    x = numbers(8, IN)  # tokens, features
    tokens = transform(8, wavelet)
    coefficients = torch.einsum("cut,bkd,td->cubk", tokens, transform(IN, wavelet, levels), x)
    back = torch.einsum("cut,bkd,cubk->td", tokens, transform(OUT, wavelet, levels), coefficients @ M.T)
    torch.testing.assert_close(update(layer, x), back)
    torch.testing.assert_close(x @ layer.get_delta_weight("default").T, back)


@pytest.mark.parametrize("levels", [1, 2])
def test_with_haar_it_is_a_kronecker_product(levels: int) -> None:
    layer = one_layer(levels=levels)
    M = 6 / R * delta_of(layer).B[0] @ delta_of(layer).A[0]
    wanted = torch.kron(M, torch.eye(2**levels, dtype=torch.float64))
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted)


def test_separate_maps_fill_the_blocks_of_the_transformed_update() -> None:
    layer = one_layer(**VARIANTS["separate"])
    delta = delta_of(layer)
    left, right = transform(OUT, "db2"), transform(IN, "db2")
    for index in range(4):
        out_band, in_band = divmod(index, 2)
        block = left[out_band] @ layer.get_delta_weight("default") @ right[in_band].T
        torch.testing.assert_close(block, 6 / R * delta.B[index] @ delta.A[index])


def test_the_tiny_one_stays_between_singular_vectors_of_the_mean_band() -> None:
    layer = one_layer(**VARIANTS["tiny"])
    W = layer.get_base_layer().weight.detach()
    left, right = transform(OUT, "db2"), transform(IN, "db2")
    mean = sum(left[b] @ W @ right[b].T for b in (0, 1)) / 2
    U, _, Vh = torch.linalg.svd(mean, full_matrices=False)
    M = 6 / R * U[:, :R] @ torch.diag(delta_of(layer).c) @ Vh[:R]
    wanted = sum(left[b].T @ M @ right[b] for b in (0, 1))
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-5, atol=1e-6)


@every_variant
@pytest.mark.parametrize(("columns", "rows"), [(12, 20), (13, 7), (18, 10)])
def test_forward_factors_and_weight_agree_at_every_size(settings: dict[str, Any], columns: int, rows: int) -> None:
    if settings.get("tiny") and rows == 7:
        settings = {**settings, "r": 2}
    layer = one_layer(columns, rows, **settings)
    B, A = delta_of(layer).factors()
    assert A.shape[0] == B.shape[1]
    x = numbers(2, 5, columns)
    torch.testing.assert_close(B @ A, layer.get_delta_weight("default"))
    torch.testing.assert_close(update(layer, x), x @ (B @ A).T)


@every_variant
def test_count_and_rank(settings: dict[str, Any]) -> None:
    layer = one_layer(r=2, **settings)
    n = 2 ** settings.get("levels", 1)
    maps = n * n if settings.get("bands") == "separate" else 1
    count = sum(p.numel() for p in delta_of(layer).parameters())
    assert count == (2 if settings.get("tiny") else maps * 2 * (IN + OUT) // n)
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default").detach()))
    assert rank == delta_of(layer).rank == 2 * (n if maps == 1 else maps)


@every_variant
def test_every_variant_begins_with_the_base_and_merges(settings: dict[str, Any]) -> None:
    plain = {**WARA.settings, "wavelet": "haar", **settings}
    assert torch.equal(adapted(WARA, **plain)(batch()), net()(batch()))
    model = adapted(WARA, trained=True, **plain)
    wanted = model(batch())
    assert not torch.allclose(wanted, net()(batch()), atol=1e-3)
    torch.testing.assert_close(model.merge_and_unload()(batch()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"wavelet": "db2"}, {"wavelet": "db3", "levels": 2}], ids=str)
def test_singular_values_come_in_groups_of_the_bands(settings: dict[str, Any]) -> None:
    """So the best approximation of a rank between is not unique."""
    layer = one_layer(**settings)
    n = 2 ** settings.get("levels", 1)
    M = 6 / R * delta_of(layer).B[0] @ delta_of(layer).A[0]
    S = torch.linalg.svdvals(layer.get_delta_weight("default"))[: n * R].detach()
    torch.testing.assert_close(S, torch.linalg.svdvals(M)[:R].repeat_interleave(n).detach())


def test_a_transform_of_tokens_alone_changes_nothing() -> None:
    """The reading of the paper's second version, on a grid of patches: a plain LoRA, whatever the wavelet."""
    with drawn_from(0):
        lora = get_peft_model(
            nn.ModuleDict({"only": nn.Linear(IN, OUT)}),
            LoraConfig(r=R, lora_alpha=R, target_modules=["only"], init_lora_weights=False),
        )
    layer = lora.base_model.model["only"].double()
    A, B = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    x = numbers(4, 6, IN)  # a grid of tokens
    for wavelet in ("haar", "db2"):
        down, across = transform(4, wavelet), transform(6, wavelet)
        bands = torch.einsum("buh,cvw,hwd->bucvd", down, across, x) @ A.T @ B.T
        back = torch.einsum("buh,cvw,bucvo->hwo", down, across, bands)
        torch.testing.assert_close(back, layer(x) - layer.get_base_layer()(x))


def test_kronecker_targets_are_its_own_and_generic_ones_are_not() -> None:
    """Energy of the best approximation: of a target M x I_2, and of one without structure."""
    n, rank = 32, 4
    U, V = (torch.linalg.qr(numbers(n // 2, n // 2) + k).Q[:, :rank] for k in (0, 1))
    target = torch.kron(U @ V.T, torch.eye(2, dtype=torch.float64))
    S = torch.linalg.svdvals(target).square()
    assert abs(S[:rank].sum() / S.sum() - 0.5) < 1e-9  # a LoRA of its r keeps half
    assert abs(S[: 2 * rank].sum() / S.sum() - 1) < 1e-9  # one of its rank has all
    blocks = numbers(n, n).unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
    inside = torch.einsum("iajb,ab->ij", blocks, torch.eye(2, dtype=torch.float64)) / 2
    share = 2 * inside.square().sum() / blocks.square().sum()
    expected = 1 / 4  # of the four entries of a block one direction lies in the span of I_2
    assert abs(share - expected) < 0.05


def test_it_is_not_wave_ft() -> None:
    """A trained number of WaveFT is a patch of the update, one of WaRA moves rows of it as a whole."""
    with drawn_from(0):
        base = nn.ModuleDict({"only": nn.Linear(16, 16)})
    wave: Any = get_peft_model(base, WaveFTConfig(n_frequency=24, target_modules=["only"], init_weights=True))
    assert wave.get_nb_trainable_parameters()[0] == 24
    spectrum = wave.base_model.model["only"].waveft_spectrum["default"]
    spectrum.data.zero_()[0] = 1
    patch = wave.base_model.model["only"].get_delta_weight("default")
    assert (patch.abs() > 1e-9).sum() == 4
    layer = one_layer(16, 16)
    assert sum(p.numel() for p in delta_of(layer).parameters()) == R * (16 + 16) // 2
    delta_of(layer).B.data.zero_()[0, 5, 1] = 1
    moved = layer.get_delta_weight("default").abs() > 1e-9
    assert moved.any(1).nonzero().flatten().tolist() == [10, 11]
    assert moved.sum() == 16


def test_what_it_refuses() -> None:
    for wavelet in ("db0", "db11", "sym2", "db2.5", ""):
        with pytest.raises(ValueError, match=r"wavelet must be haar or db1 to db10, got "):
            WARA.config(wavelet=wavelet)
    with pytest.raises(ValueError, match=r"levels must be a whole number from 1, got 0"):
        WARA.config(levels=0)
    with pytest.raises(ValueError, match=r"bands must be one of shared, separate, got 'all'"):
        WARA.config(bands="all")
    with pytest.raises(ValueError, match=r"tiny has one map for all bands: leave bands at 'shared'"):
        WARA.config(bands="separate", tiny=True)
    with pytest.raises(ValueError, match=r"wide: r is 7, and the bands of the weight are \(10, 6\); lower r or leave"):
        adapted(WARA, tiny=True, r=7)


def test_every_layer_begins_with_numbers_of_its_own_as_wide_as_loras() -> None:
    first, second = (delta_of(layer).A for name, layer in layers(adapted(WARA, r=100)).items() if "wide" in name)
    assert not torch.equal(first, second)
    for A in (first, second):
        assert 0.95 < A.abs().max() * math.sqrt(IN / 2) <= 1
