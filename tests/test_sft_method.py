"""`train` with other methods: what comes out is a plain LoRA of the target rank, whatever was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftModel
from train_cases import Place, private_cache
from transformers import AutoModelForCausalLM

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods import CATALOGUE
from lora_squeeze.training.sft import train
from lora_squeeze.training.sft_settings import TrainSettings

# What the tiny model needs of a method beside its defaults.
OPTIONS = {"nola": "bases=8", "unilora": "theta_d_length=64", "projlora": "length=64"}
PEFTS_OWN = ("vera", "loha", "randlora", "shira", "unilora")
OURS = tuple(entry.name for entry in CATALOGUE if entry.config)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("methods")
    with private_cache(folder / "cache"):
        yield Place(folder).written()


def asked(place: Place, output: Path, method: str, **more: Any) -> TrainSettings:
    options = {"source_rank": None, "steps": 3, "method": method, "method_options": OPTIONS.get(method), **more}
    return place.settings(output, **options)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's SHiRA
@pytest.mark.parametrize("method", [*OURS, *PEFTS_OWN])
def test_every_method_ends_as_a_plain_lora_of_the_target_rank(place: Place, tmp_path: Path, method: str) -> None:
    trained = train(asked(place, tmp_path / "out", method))
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.peft_type == "LORA"
    assert trained.rank == (1 if method == "blocklora" else 2)  # of two blocks, which share their rows
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    updates = [m.get_delta_weight("default") for m in model.modules() if hasattr(m, "lora_A")]
    assert all(update.isfinite().all() for update in updates)
    assert max(update.abs().max().item() for update in updates) > 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["settings"]["method"] == method
    assert 0 < record["squeezes"][0]["energy"] <= 1 + 1e-9
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_own_rank_above_the_target_is_squeezed(place: Place, tmp_path: Path) -> None:
    trained = train(asked(place, tmp_path / "out", "nola", source_rank=6))
    assert trained.rank == 2
    assert 0 < trained.squeezes[0]["energy"] < 1
    exact = train(asked(place, tmp_path / "exact", "nola"))
    assert exact.squeezes[0]["energy"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nolla"}, "no method 'nolla'; `lora-squeeze methods` lists them, PEFT has "),
        ({"method": "prompt_tuning"}, "Prompt tuning cannot become a LoRA: it trains inputs of the layers"),
        ({"method_options": "basis=3"}, "NOLA has no option 'basis'; there are "),
        ({"method_options": "bases"}, "method_options must read name=value,name=value, got 'bases'"),
        ({"method_options": "bases=0"}, "NOLA: bases must be a whole number from 1, got 0"),
    ],
    ids=["unknown", "no-weights", "option", "form", "value"],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    place: Place, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(LoraSqueezeError) as refused:
        train(asked(place, tmp_path / "out", **{"method": "nola", **changes}, model="nowhere"))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "option", [{"mode": "in"}, {"squeezes": 2}, {"data_aware": True}, {"allocate": "global"}], ids=str
)
def test_options_of_squeezes_mean_nothing_with_a_method(place: Place, tmp_path: Path, option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(LoraSqueezeError, match=f"{name} is of training a LoRA; with method nola leave it out"):
        asked(place, tmp_path, "nola", **option)
    with pytest.raises(LoraSqueezeError, match="method_options are those of a method: name it with method"):
        place.settings(tmp_path, method_options="bases=3")
