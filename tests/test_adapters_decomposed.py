"""Factors that are computed from W again when an adapter is loaded: they are the same, or the adapter is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Net, adapted, batch, drawn_from, net
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.decomposed import fingerprint_of_factors

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "svfit": ("svfit", {"r": None}),
    "loldu": ("loldu", {"r": None}),
    "loraxs": ("loraxs", {"r": 12}),
    "wara-tiny": ("wara", {"tiny": True, "r": 3}),
}
every = pytest.mark.parametrize("case", CASES)


def model_of(case: str, base: nn.Module, trained: bool = True) -> Any:
    name, settings = CASES[case]
    return adapted(METHODS[name], base, trained=trained, **settings)


def another() -> Net:
    """A net that begins with other numbers."""
    with drawn_from(5):
        return Net()


def with_weights(made: Callable[[Tensor], Tensor]) -> Net:
    """The tiny net with other weights in its adapted layers."""
    base = net()
    for block in base.blocks:
        for layer in block.children():
            assert isinstance(layer, nn.Linear)
            layer.weight.data = made(layer.weight.data)
    return base


def orthogonal(W: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U @ Vh


def of_one(W: Tensor) -> Tensor:
    """A matrix of rank 1."""
    return W[:, :1] @ W[:1]


def of_equal_sizes(W: Tensor) -> Tensor:
    """Any row may be the first pivot."""
    return W.sign() / 4


def of_low_rank(W: Tensor) -> Tensor:
    return W[:, :5] @ W[:5]


def with_last_bits_changed(W: Tensor) -> Tensor:
    """As after a merge that was taken back."""
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(7))
    return W + noise * 3e-8 * W.norm() / noise.norm()


@pytest.mark.parametrize(
    ("case", "made"),
    [("svfit", orthogonal), ("loraxs", orthogonal), ("loldu", of_equal_sizes), ("wara-tiny", of_one)],
    ids=lambda c: c,
)
def test_last_bits_that_change_the_factors_are_refused(
    case: str, made: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    model_of(case, with_weights(made)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(with_weights(made), tmp_path)
    way_out = ", or train with store_factors=True" if case in ("svfit", "loraxs") else ""
    wanted = (
        "blocks.0.wide: the weight is that of the training but for its last bits, and just those decide about its "
        "factors, which are others now; load the base model anew, without a merge that was taken back"
    )
    with pytest.raises(LoraSqueezeError, match=f"^{wanted}{way_out}$"):
        PeftModel.from_pretrained(with_weights(lambda W: with_last_bits_changed(made(W))), tmp_path)


@every
def test_last_bits_that_change_nothing_are_let_pass(case: str, tmp_path: Path) -> None:
    model = model_of(case, net())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(with_weights(with_last_bits_changed), tmp_path).eval()
    assert torch.allclose(again(batch()), model(batch()), atol=1e-4)


@every
def test_another_weight_is_refused(case: str, tmp_path: Path) -> None:
    model_of(case, net()).save_pretrained(tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"blocks.0.wide: the adapter was trained over a weight with other n"):
        PeftModel.from_pretrained(another(), tmp_path)


@every
def test_transformers_refuses_another_weight_too(case: str, tmp_path: Path) -> None:
    def base(seed: int) -> Any:
        with drawn_from(seed):
            return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=8)).eval()

    name, settings = CASES[case]
    model = adapted(METHODS[name], base(0), trained=True, target_modules=["c_attn"], **settings)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    plain = base(0)
    plain.load_adapter(tmp_path)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    with pytest.raises(LoraSqueezeError, match=r"h.0.attn.c_attn: the adapter was trained over a weight with other n"):
        base(1).load_adapter(tmp_path)


@every
def test_a_file_from_before_the_fingerprints_is_loaded(case: str, tmp_path: Path) -> None:
    model = model_of(case, net())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    since = "fingerprint" if case == "wara-tiny" else "fingerprint_of_factors"
    save_file({key: value for key, value in load_file(file).items() if since not in key}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))


@every
@pytest.mark.parametrize("made", [torch.clone, of_low_rank], ids=["full-rank", "low-rank"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_whole_state_brings_its_base_weights_along(case: str, made: Callable[[Tensor], Tensor], assign: bool) -> None:
    model = model_of(case, with_weights(made))
    again = model_of(case, another(), trained=False)
    drawn = torch.random.get_rng_state()
    again.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(torch.random.get_rng_state(), drawn), "the global generator is left alone"
    assert torch.equal(again(batch()), model(batch()))
    alone = {key: value for key, value in model_of(case, net(torch.bfloat16)).state_dict().items() if "_delta" in key}
    with pytest.raises(LoraSqueezeError, match="trained over a weight with other numbers"):
        again.load_state_dict(alone, strict=False)


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_the_fingerprint_of_the_factors_sees_what_changes_an_update(diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(30, 6, generator=generator), torch.randn(6, 20, generator=generator)
    wanted = fingerprint_of_factors(B, A, diagonal)

    def moved(B: Tensor, A: Tensor) -> float:
        return float((fingerprint_of_factors(B, A, diagonal) - wanted).abs().max()) * 2.0**-30

    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1])
    assert moved(B @ turn, turn.T @ A) > 0.1
    assert moved(B.flip(1), A.flip(0)) > 0.1
    assert (moved(B * signs, signs[:, None] * A) < 1e-6) == diagonal
    assert moved(B * (1 + 1e-7), A) < 1e-6
    assert not fingerprint_of_factors(B * 0, A, diagonal).any()
