"""Intruder directions, against the dense definition and against PEFT's own count."""

import re
from pathlib import Path

import peft
import pytest
import torch
from command_cases import command
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft_cases import llama
from torch import Tensor

import lora_squeeze
from lora_squeeze.base_model import open_base
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.intruders import THRESHOLD, TOP, intruders


def by_definition(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    U = torch.linalg.svd(W.double(), full_matrices=False).U
    Y = torch.linalg.svd(W.double() + dW.double(), full_matrices=False).U[:, :top]
    return int(((U.mT @ Y).abs().amax(0) < threshold).sum())


def weight(out: int, inp: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inp, generator=generator) * 0.9 ** torch.arange(inp)


def update(out: int, inp: int, rank: int, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, inp, generator=generator)
    return size * B @ A / (out * inp) ** 0.5


@pytest.mark.parametrize(("out", "inp"), [(40, 40), (24, 60), (60, 24)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("top", [3, TOP, 100])
def test_the_count_is_that_of_the_definition(out: int, inp: int, size: float, top: int) -> None:
    W = weight(out, inp, 1)
    dW = update(out, inp, 4, size, 2)
    assert intruders(W, dW, top=top) == by_definition(W, dW, top, THRESHOLD)


def test_a_large_update_brings_intruders_and_none_brings_none() -> None:
    W = weight(60, 40, 1)
    assert intruders(W, torch.zeros_like(W)) == 0
    assert intruders(W, update(60, 40, 4, 100.0, 2)) == 4, "one for each direction of the update"


def test_everything_is_new_to_a_weight_of_zeros() -> None:
    for shape in ((8, 12), (12, 8)):
        assert intruders(torch.zeros(shape), update(*shape, 3, 1.0, 0)) == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and an adapter whose modules have few, many or no intruders."""
    folder = tmp_path_factory.mktemp("intruders")
    torch.manual_seed(0)
    base = llama(initializer_range=0.3)
    base.save_pretrained(folder / "model")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    sizes = iter([0.0, 0.1, 0.3, 1.0, 3.0, 0.5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * next(sizes))
    model.save_pretrained(folder / "adapter")
    return folder


def peft_counts(place: Path) -> dict[str, int]:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, place / "adapter")
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=TOP, threshold_epsilon=THRESHOLD, logging_sink=lines.append)
    found = (re.match(r"base_model\.model\.(.*): (?:Intruders: (\d+)|No intruders)", line) for line in lines)
    return {match[1]: int(match[2] or 0) for match in found if match}


def test_inspect_counts_as_peft_does(place: Path) -> None:
    expected = peft_counts(place)
    assert len(set(expected.values())) > 1
    report = lora_squeeze.inspect(lora_squeeze.load(place / "adapter"), base=open_base(place / "model"), intruders=True)
    assert {row.name: row.base.intruders for row in report.rows if row.base} == expected
    some = [name for name, count in expected.items() if count]
    assert any(
        note.startswith(f"{sum(expected.values())} intruder directions among the first 10 of 6 modules, in {len(some)}")
        for note in report.notes
    )


def test_without_being_asked_nothing_is_counted(place: Path) -> None:
    report = lora_squeeze.inspect(lora_squeeze.load(place / "adapter"), base=open_base(place / "model"))
    assert all(row.base is not None and row.base.intruders is None for row in report.rows)


def test_they_need_the_base(place: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="intruder directions are counted in the base weights: give the base"):
        lora_squeeze.inspect(lora_squeeze.load(place / "adapter"), intruders=True)


def test_the_command_shows_a_column(place: Path, tmp_path: Path) -> None:
    run = command(tmp_path, "inspect", place / "adapter", "--base", place / "model", "--intruders")
    assert run.code == 0 and "intruders" in run.out and "intruder directions among the first 10" in run.out, run.err
    run = command(tmp_path, "inspect", place / "adapter", "--base", place / "model")
    assert run.code == 0 and "intruders" not in run.out
