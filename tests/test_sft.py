"""Training with a squeeze in it: what comes out, how it resumes, what is refused before a model is loaded."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from folder_cases import tree
from peft import PeftModel
from peft_cases import llama
from train_cases import RANK, SOURCE_RANK, Place, conversations, private_cache, tensors, tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training import libraries, sft
from lora_squeeze.training.sft import Trained, train
from lora_squeeze.training.sft_settings import TrainSettings

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("train")
    with private_cache(folder / "cache"):
        yield Place(folder).written()


@dataclass(frozen=True)
class Finished:
    """One training without a break, and the random state before and after it."""

    trained: Trained
    folder: Path
    states: list[tuple[Any, ...]]


def random_states() -> tuple[Any, ...]:
    """Not Python's own: the type checker of the test suite draws from it, to pick the items of lists that it checks."""
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def whole_run(place: Place, output: Path, **changes: Any) -> TrainSettings:
    held = str(place.folder / "held.jsonl")
    return place.settings(output, **{"data_aware": True, "gradient_checkpointing": True, "eval_data": held, **changes})


@pytest.fixture(scope="module")
def finished(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished") / "out"
    before = random_states()
    trained = train(whole_run(place, folder))
    return Finished(trained, folder, [before, random_states()])


# --- what comes out -------------------------------------------------------------------------------------------------


def test_the_output_is_a_plain_adapter_of_the_target_rank(place: Place, finished: Finished) -> None:
    config = json.loads((finished.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (RANK, 2 * RANK, {}), "the scale stays 2"
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model = PeftModel.from_pretrained(base, finished.folder)
    shapes = [p.shape for name, p in model.named_parameters() if "lora_A" in name]
    assert len(shapes) == 14 and {shape[0] for shape in shapes} == {RANK}
    assert finished.trained.rank == RANK
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {"README.md", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert AutoTokenizer.from_pretrained(finished.folder)("a b")["input_ids"] == tokenizer()("a b")["input_ids"]


def test_the_loss_goes_down(finished: Finished) -> None:
    losses, held = list(finished.trained.losses.values()), list(finished.trained.evaluations.values())
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0] and held[-1] < 0.8 * held[0]


def test_the_record_beside_the_adapter_tells_settings_squeezes_and_losses(finished: Finished) -> None:
    record = json.loads((finished.folder / "training.json").read_text())
    assert record["settings"]["source_rank"] == SOURCE_RANK and record["settings"]["output"] == str(finished.folder)
    assert [(s["step"], s["rank"]) for s in record["squeezes"]] == [(7, 4), (10, RANK)]
    assert all(0 < s["energy"] <= 1 and s["loss_before"] > 0 and s["loss_after"] > 0 for s in record["squeezes"])
    assert record["losses"] == {str(step): loss for step, loss in finished.trained.losses.items()}
    assert record["versions"]["trl"] == __import__("trl").__version__ and record["rank"] == RANK


def test_nothing_is_left_beside_the_output(finished: Finished) -> None:
    assert [path.name for path in finished.folder.parent.iterdir()] == ["out"]


def test_the_global_random_generators_are_put_back(finished: Finished) -> None:
    before, after = finished.states
    assert before == after


@pytest.mark.parametrize(
    ("changes", "squeezed_at"),
    [
        ({"stage_steps": "inverse", "squeezes": 1}, [1]),
        ({"stage_steps": "equal", "squeezes": 1}, [2]),
        ({"mode": "cont", "last_steps": 2}, [2]),
        ({"mode": "post"}, [4]),
        ({"mode": "adaptive", "energy": 0.5, "allocate": "uniform"}, None),
    ],
)  # fmt: skip
def test_every_mode_ends_at_the_target_rank(
    place: Place, tmp_path: Path, changes: dict[str, Any], squeezed_at: list[int] | None
) -> None:
    trained = train(place.settings(tmp_path / "out", steps=4, **changes))
    assert {t.shape[0] for name, t in tensors(tmp_path / "out").items() if "lora_A" in name} == {RANK}
    assert squeezed_at is None or [entry["step"] for entry in trained.squeezes] == squeezed_at


def test_alpha_targets_and_epochs_are_as_asked(place: Place, tmp_path: Path) -> None:
    asked = place.settings(
        tmp_path / "out", alpha=SOURCE_RANK, targets="q_proj, up_proj", steps=None, epochs=0.5, squeezes=1,
        gradient_accumulation=2, optimizer_state="reset", learning_rate_policy="restart",
    )  # fmt: skip
    trained = train(asked)
    assert trained.steps == 2, "half of ceil(48 examples / 8 / 2)"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == RANK, "the scale stays 1"
    assert {name.split(".")[-3] for name in tensors(tmp_path / "out")} == {"q_proj", "up_proj"}


def test_conversations_are_learned_by_the_chat_template(place: Place, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "chat.jsonl", conversations(16))
    losses = train(place.settings(tmp_path / "out", data=data, steps=4, mode="post")).losses
    assert losses[4] < losses[1]


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def report(now: int, steps: int, logged: Any) -> None:
        if now == step and "loss" in logged:
            raise Stop

    return report


@pytest.fixture(scope="module")
def interrupted(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 7, with its last checkpoint after step 5, and a younger one that is not whole."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(Stop):
        train(whole_run(place, folder, save_steps=5), stop_at(7))
    assert not folder.exists(), "the output is written as a whole or not at all"
    shutil.copytree(folder.parent / "out-checkpoints/checkpoint-5", folder.parent / "out-checkpoints/checkpoint-6")
    state = folder.parent / "out-checkpoints/checkpoint-6/trainer_state.json"
    state.write_text(state.read_text()[:100])
    return folder


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    place: Place, finished: Finished, interrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(interrupted.parent, tmp_path, dirs_exist_ok=True)
    trained = train(whole_run(place, tmp_path / "out", resume=True))
    whole, ours = tensors(finished.folder), tensors(tmp_path / "out")
    assert whole.keys() == ours.keys() and all(torch.equal(whole[name], ours[name]) for name in whole)
    assert trained.losses == finished.trained.losses and trained.evaluations == finished.trained.evaluations
    timeless = [[{**entry, "seconds": 0} for entry in run.squeezes] for run in (trained, finished.trained)]
    assert timeless[0] == timeless[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "checkpoints go with the end of the training"


def test_a_training_whose_output_cannot_be_written_is_not_lost(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not where it ends in the middle of an epoch, from where transformers would train one step too many."""
    settings = place.settings(tmp_path / "out", steps=2, save_steps=1, mode="post")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(sft, "replace_folder", None)
        train(settings)
    assert (tmp_path / "out-checkpoints" / "checkpoint-2").is_dir()
    trained = train(replace(settings, resume=True))
    assert (trained.rank, list(trained.losses)) == (RANK, [1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_of_another_training_are_not_taken_up(place: Place, interrupted: Path) -> None:
    before = tree(interrupted.parent)
    changed = whole_run(place, interrupted, resume=True, learning_rate=0.5, seed=3)
    with pytest.raises(
        LoraSqueezeError, match=r"another training: learning_rate was 0.03 and is 0.5, seed was 0 and is"
    ):
        train(changed)
    with pytest.raises(
        LoraSqueezeError, match=r"unfinished training; go on with --resume .*or begin anew with --force"
    ):
        train(whole_run(place, interrupted))
    assert tree(interrupted.parent) == before


def test_something_else_where_checkpoints_go_is_left_alone(place: Place, tmp_path: Path) -> None:
    (tmp_path / "out-checkpoints").mkdir()
    (tmp_path / "out-checkpoints" / "diary.txt").write_text("mine")
    for changes in ({"force": True}, {"resume": True}):
        with pytest.raises(LoraSqueezeError, match="holds something else; move it away"):
            train(place.settings(tmp_path / "out", **changes))
    assert (tmp_path / "out-checkpoints" / "diary.txt").read_text() == "mine"


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(place.settings(tmp_path / "deep" / "out", save_steps=5), stop_at(1))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- an adapter that is continued -----------------------------------------------------------------------------------


def test_a_finished_adapter_is_squeezed_at_once_and_learns_on(place: Place, tmp_path: Path) -> None:
    before = tree(place.folder / "adapter")
    trained = train(place.continued(tmp_path / "out", steps=6))
    (squeeze,) = trained.squeezes
    assert (squeeze["step"], squeeze["rank"]) == (0, RANK) and 0 < squeeze["energy"] < 1
    assert trained.losses[6] < trained.losses[1]
    found = tensors(tmp_path / "out")
    assert {t.shape[0] for name, t in found.items() if "lora_A" in name} == {RANK}
    assert found.keys() == tensors(place.folder / "adapter").keys()
    assert tree(place.folder / "adapter") == before


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 8}, "the target rank 8 is not below the source rank 8; lower rank or raise source_rank"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": 2.0}, "give steps or epochs, got 12 steps and 2.0 epochs"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"warmup": 1.0}, "warmup is a share of the steps from 0 to below 1, got 1.0"),
        ({"seed": -1}, "seed and save_steps must be at least 0, got -1 and 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"allocate": "fairly"}, "allocate must be one of uniform, global, got 'fairly'"),
        ({"allocate": "each"}, "allocate must be one of uniform, global, got 'each'"),
        ({"energy": 0.9}, "energy is no option of mode 'in': leave it out, or use mode 'adaptive'"),
        ({"mode": "adaptive", "last_steps": 1}, "last_steps is no option of mode 'adaptive': .* mode 'cont' or 'in'"),
        ({"stage_steps": "fair"}, "stage_steps must be one of equal, proportional, sqrt, inverse, got 'fair'"),
        ({"mode": "post", "stage_steps": "equal"}, "stage_steps is no option of mode 'post': .* or use mode 'in'"),
        ({"optimizer_state": "shake"}, "optimizer_state must be one of transport, reset, got 'shake'"),
        ({"distill": True}, "distill needs a finished adapter as the teacher: name the one to continue"),
        ({"generate": 9}, "generate is an option of distillation; add distill, or leave it out"),
        ({"source_rank": None, "adapter": "a", "mode": "post"}, "mode means nothing for an adapter that is squeezed"),
        ({"source_rank": None, "adapter": "a", "distill": True, "generate": 20, "max_length": 20},
         "generate 20 leaves no room for a prompt in 20 tokens"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_by_themselves(
    place: Place, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(LoraSqueezeError, match=text):
        place.settings(tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "sideways"}, "mode must be one of .*got 'sideways'"),
        ({"steps": 2}, "the schedule is longer than the training: 3 x 1 .* the training has 2"),
        ({"steps": None, "epochs": 0.1}, "the training has 1"),
        ({"mode": "post", "squeezes": 2}, "squeezes is no option of mode 'post'"),
        ({"data": "nothing.jsonl"}, "no such file"),
        ({"eval_data": "nothing.jsonl"}, "no such file"),
        ({"report_to": "pigeon"}, "no tracker 'pigeon' is installed"),
        ({"model": "no/model"}, "no/model: no model with a tokenizer here or on the hub"),
        ({"source_rank": None, "adapter": "ADAPTER", "rank": 8}, "has rank 8: nothing to squeeze to rank 8; lower"),
        ({"source_rank": None, "adapter": "no/adapter"}, "no/adapter: no such folder here, and the hub did"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_a_model_is_loaded(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    if changes.get("adapter") == "ADAPTER":
        changes = {**changes, "adapter": str(place.folder / "adapter")}
    with pytest.raises(LoraSqueezeError, match=text):
        train(place.settings(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_without_force(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text("{}")
    with pytest.raises(LoraSqueezeError, match=r"exists already and nothing was written; .*--force"):
        train(place.settings(tmp_path / "out"))


def test_missing_packages_several_processes_and_several_gpus_are_told(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = place.settings(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(libraries, "find_spec", lambda name: None if name in ("trl", "datasets") else name)
        with pytest.raises(
            LoraSqueezeError, match=r"training needs datasets and trl: pip install 'lora-squeeze\[train\]'"
        ):
            train(settings)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(LoraSqueezeError, match="in one process; for several, use SqueezeCallback"):
            train(settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(LoraSqueezeError, match=r"several GPUs are visible, .*CUDA_VISIBLE_DEVICES=0"):
            train(settings)


def test_a_tokenizer_that_cannot_end_or_chat_is_refused(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.folder / "model", tmp_path / "model")
    model = str(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(LoraSqueezeError, match="the data are messages, but its tokenizer has no chat template"):
        train(place.settings(tmp_path / "out", model=model, data=chat))
    endless = tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "model")
    with pytest.raises(LoraSqueezeError, match="its tokenizer has no end-of-text token"):
        train(place.settings(tmp_path / "out", model=model))


def test_what_trl_or_peft_refuse_is_told_as_our_refusal(place: Place, tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"TRL refuses this training: Target modules .*nowhere"):
        train(place.settings(tmp_path / "out", targets="nowhere"))
    with pytest.raises(LoraSqueezeError, match="in no example does anything to learn begin within 2 tokens"):
        train(place.settings(tmp_path / "out", max_length=2))
    other = replace(place.continued(tmp_path / "out"), model=str(tmp_path / "wide"))
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    tokenizer().save_pretrained(tmp_path / "wide")
    with pytest.raises(LoraSqueezeError, match=r"adapter does not fit .*wide \(Error\(s\) in loading state_dict"):
        train(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]
