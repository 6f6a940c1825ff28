"""Adapters whose initialisation changed the base weights, minus the adapter as it was: a plain LoRA on the original."""

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from peft_cases import CASES, llama, tokens
from peft_models import Case, adapted, best, deltas, outputs, randomise, reload, save, seeded

import lora_squeeze
from lora_squeeze.combine import merge, subtract
from lora_squeeze.combine_pair import load_pair
from lora_squeeze.errors import LoraSqueezeError

INITS = ["pissa", "pissa_niter_4", "olora"]


def trained(init: str, folder: Path, **changes: object) -> tuple[Case, torch.Tensor]:
    """Saves `initial` and `trained`; the outputs of the trained model."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init, **changes}
    case = Case(llama, config, tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(seeded(llama), LoraConfig(**config))
    save(model, folder / "initial")
    randomise(model, 0.1)
    save(model, folder / "trained")
    return case, outputs(model.double(), case)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_the_difference_on_the_original_base_is_the_trained_model(tmp_path: Path, init: str, rslora: bool) -> None:
    case, expected = trained(init, tmp_path, use_rslora=rslora)
    change = subtract(*load_pair(tmp_path / "trained", tmp_path / "initial"))
    assert change.rank == 6
    change.save(tmp_path / "change")
    found = reload(case, tmp_path / "change")
    torch.testing.assert_close(outputs(found, case), expected, rtol=1e-3, atol=1e-4)
    subtract(*load_pair(tmp_path / "trained", tmp_path / "initial"), rank=3).save(tmp_path / "small")
    whole, small = deltas(found), deltas(reload(case, tmp_path / "small"))
    for name, dW in whole.items():
        torch.testing.assert_close(small[name], best(dW, 3), rtol=1e-4, atol=1e-6)
    assert lora_squeeze.load(tmp_path / "small").rank == 3


def test_alone_they_are_refused_with_this_way_out(tmp_path: Path) -> None:
    trained("pissa", tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"PiSSA subtracts .*convert ADAPTER .*--initial ADAPTER"):
        lora_squeeze.load(tmp_path / "trained")


def test_a_pair_of_different_kinds_is_refused(tmp_path: Path) -> None:
    trained("pissa", tmp_path)
    plain = save(adapted(CASES["patterns"]), tmp_path / "plain")
    for one, two in ((tmp_path / "trained", plain), (plain, tmp_path / "initial")):
        with pytest.raises(LoraSqueezeError, match="their base weights differ, so that the difference is no change"):
            load_pair(one, two)


def test_plain_adapters_are_read_as_ever(tmp_path: Path) -> None:
    plain = save(adapted(CASES["patterns"]), tmp_path / "plain")
    one, two = load_pair(plain, plain)
    assert one.modules == two.modules == lora_squeeze.load(plain).modules
    assert merge([one]).modules.keys() == one.modules.keys()
