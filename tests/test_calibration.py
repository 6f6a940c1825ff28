"""Examples asked about adapters on disk: the statistics, their file, and the losses."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import Result
from command_cases import command
from peft import PeftModel
from train_cases import RANK, SOURCE_RANK, Place, conversations, examples, private_cache, write_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lora_squeeze.calibration_file import Calibration
from lora_squeeze.cli.app import app
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.hub import load
from lora_squeeze.plan import Plan
from lora_squeeze.runtime import choose_precision
from lora_squeeze.training.calibration import Examples, Subject
from lora_squeeze.training.live import live_modules


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place")).written()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with private_cache(tmp_path_factory.mktemp("cache")):
        yield


def subject(place: Place, data: str = "train.jsonl", **options: int) -> Subject:
    asked = Examples(str(place.folder / data), **{"examples": 24, **options})  # type: ignore[arg-type]
    folder = place.folder / "adapter"
    return Subject(load(folder), folder, asked, base=str(place.folder / "model"), dtype="float32")


@pytest.fixture(scope="module")
def found(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    with private_cache(tmp_path_factory.mktemp("cache")), subject(place) as it:
        return it.calibrate()


def peft_loss(
    place: Place, folder: Path, batches: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float32
) -> float:
    """The loss of an adapter's folder as PEFT loads it."""
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model", dtype=dtype)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def test_the_factors_of_the_file_are_those_of_the_live_model(place: Place) -> None:
    """So that statistics of the one hold for the other."""
    adapter = load(place.folder / "adapter")
    with subject(place) as it:
        modules = live_modules(it.model, "default")
        assert [module.name for module in modules] and {m.name for m in modules} == set(adapter.modules)
        for module in modules:
            update = adapter.update(module.name)
            assert torch.equal(module.update().A, update.A) and torch.equal(module.update().B, update.B), module.name
            assert module.scale == update.scale


def test_every_module_is_seen_and_the_loss_is_that_of_the_adapter(place: Place, found: Calibration) -> None:
    adapter = load(place.folder / "adapter")
    assert set(found.moments) == set(adapter.modules) and found.examples == 24
    with subject(place) as it:
        assert found.loss == pytest.approx(peft_loss(place, place.folder / "adapter", it.batches), rel=1e-5)
        assert it.loss_with(adapter) == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.parametrize("dial", [{"rank": 2}, {"params": 300}], ids=["rank", "budget with modules that leave"])
def test_the_loss_with_a_squeezed_adapter_is_that_of_its_folder(
    place: Place, found: Calibration, tmp_path: Path, dial: dict[str, int]
) -> None:
    small = load(place.folder / "adapter").squeeze(moments=found.moments, **dial)  # type: ignore[arg-type]
    small.save(tmp_path / "small")
    with subject(place) as it:
        before = [module.A.clone() for module in live_modules(it.model, "default")]
        measured = it.loss_with(small)
        assert measured == pytest.approx(peft_loss(place, tmp_path / "small", it.batches), rel=1e-4)
        after = [module.A for module in live_modules(it.model, "default")]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "put back"
    assert measured != found.loss


def test_the_loss_of_a_small_cut_is_as_predicted(place: Place, tmp_path: Path) -> None:
    """The last direction of every module holds a thousandth of the others: then the slope is nearly all there is."""
    load(place.folder / "adapter").save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for key in tensors:
        if "lora_B" in key:
            tensors[key][:, -1] *= 1e-3
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    adapter = load(tmp_path / "adapter")
    asked = Examples(str(place.folder / "train.jsonl"), examples=24)
    with Subject(adapter, tmp_path / "adapter", asked, base=str(place.folder / "model"), dtype="float32") as it:
        found = it.calibrate()
        small = adapter.squeeze(rank=SOURCE_RANK - 1, moments=found.moments)
        measured = it.loss_with(small) - found.loss
    assert abs(measured) > 1e-5
    assert small.report.loss_increase == pytest.approx(measured, rel=0.1)


def test_the_same_seed_draws_the_same_examples_and_the_global_generator_is_left_alone(place: Place) -> None:
    state = torch.random.get_rng_state()
    with subject(place, seed=1) as one, subject(place, seed=1) as other, subject(place, seed=2) as third:
        same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.batches, other.batches, strict=True)]
        assert all(same)
        assert any(
            a["input_ids"].shape != b["input_ids"].shape or not torch.equal(a["input_ids"], b["input_ids"])
            for a, b in zip(one.batches, third.batches, strict=True)
        )
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_the_completion_counts_and_conversations_are_read_by_the_template(place: Place, tmp_path: Path) -> None:
    write_rows(place.folder / "chat.jsonl", conversations(8))
    write_rows(place.folder / "text.jsonl", [{"text": row["prompt"] + row["completion"]} for row in examples(8)])
    counted = {}
    for name in ("train.jsonl", "chat.jsonl", "text.jsonl"):
        with subject(place, name, examples=8) as it:
            counted[name] = sum(int((batch["labels"] != -100).sum()) for batch in it.batches)
    assert counted["train.jsonl"] < counted["text.jsonl"] < counted["chat.jsonl"], counted


def test_statistics_come_back_from_their_file_and_are_refused_for_another_adapter(
    place: Place, found: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "statistics.safetensors"
    found.save(path)
    again = Calibration.load(path)
    assert (again.loss, again.examples, again.data, again.base) == (found.loss, found.examples, found.data, found.base)
    for name, item in found.moments.items():
        assert torch.equal(item.C, again.moments[name].C) and torch.equal(item.F, again.moments[name].F)
        assert item.rows == again.moments[name].rows
        assert item.slope is not None and torch.equal(item.slope, again.moments[name].slope)
    tensors = safetensors.torch.load_file(path)
    assert {key.rpartition(".")[0] for key in tensors} == set(found.moments), "readable by others"
    again.check(load(place.folder / "adapter"))
    load(place.folder / "adapter").squeeze(rank=4).save(tmp_path / "other")
    with pytest.raises(LoraSqueezeError, match=r"the statistics are of another adapter \(sha256 .*\); calibrate"):
        again.check(load(tmp_path / "other"))
    with pytest.raises(LoraSqueezeError, match="exists already"):
        found.save(path)
    found.save(path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "statistics.safetensors"]


def test_other_files_are_no_statistics(place: Place, tmp_path: Path, found: Calibration) -> None:
    with pytest.raises(LoraSqueezeError, match=r"no statistics of a calibration .*; make them with lora-squeeze cal"):
        Calibration.load(place.folder / "adapter" / "adapter_model.safetensors")
    path = tmp_path / "broken.safetensors"
    found.save(path)
    header = json.loads(safetensors.safe_open(path, "pt").metadata()["calibration"])
    header["rows"]["no.such"] = 1.0
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"calibration": json.dumps(header)})
    with pytest.raises(LoraSqueezeError, match=r"no\.such"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task_type": "SEQ_CLS"}, "the adapter is for SEQ_CLS; only causal language models.*squeeze.moments"),
        ({"base_model_name_or_path": None}, "names no base model; give one with base"),
    ],
    ids=["another task", "no base"],
)
def test_an_adapter_that_cannot_be_asked_is_refused(
    place: Place, tmp_path: Path, change: dict[str, object], text: str
) -> None:
    load(place.folder / "adapter").save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LoraSqueezeError, match=text):
        Subject(load(tmp_path / "adapter"), tmp_path / "adapter", Examples(str(place.folder / "train.jsonl")))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(LoraSqueezeError, match="examples must be at least 1, got 0"):
        Examples("data.jsonl", examples=0)


def run(place: Place, word: str, *arguments: object) -> Result:
    """In this process: transformers loads with threads, which a fork after the first model does not survive."""
    return CliRunner().invoke(app, [word, str(place.folder / "adapter"), *map(str, arguments)], catch_exceptions=False)


def test_calibrate_plan_and_squeeze_from_the_command_line(place: Place, tmp_path: Path) -> None:
    data, model, statistics = place.folder / "train.jsonl", place.folder / "model", tmp_path / "statistics.safetensors"
    done = run(place, "calibrate", data, "--base", model, "-o", statistics, "--examples", 16)
    assert done.exit_code == 0 and "16 examples, loss " in done.stdout and f"written to {statistics}" in done.stdout, (
        done.stderr
    )
    done = run(place, "calibrate", data, "--base", model, "-o", statistics, "--json", "--force")
    told = json.loads(done.stdout)
    assert told["examples"] == 48 and told["unseen"] == [] and told["modules"] == 8

    done = run(place, "plan", "--rank", RANK, "--allocate", "global", "--calibrate", statistics,
               "-o", tmp_path / "plan.toml")  # fmt: skip
    assert done.exit_code == 0 and "predicted loss per parameter" in done.stdout, done.stderr
    plan = Plan.load(tmp_path / "plan.toml")
    assert "loss_increase" in plan.totals and "loss" not in plan.totals

    done = run(place, "squeeze", "--plan", tmp_path / "plan.toml", "--calibrate", statistics,
               "-o", tmp_path / "small", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    adapter = load(place.folder / "adapter")
    expected = adapter.squeeze(plan=plan, moments=Calibration.load(statistics).moments)
    written = load(tmp_path / "small")
    for name in expected.modules:
        assert torch.equal(expected.update(name).B, written.update(name).B)
    assert json.loads(done.stdout)["loss_increase"] == expected.report.loss_increase
    assert json.loads(done.stdout)["notes"] == []
    done = run(place, "squeeze", "--plan", tmp_path / "plan.toml", "--dry-run")
    assert "the plan was made with data: without --calibrate its ranks are kept, but cut plainly" in done.stdout


def test_with_examples_the_loss_is_measured_as_well_as_predicted(place: Place, tmp_path: Path) -> None:
    data, model = place.folder / "train.jsonl", place.folder / "model"
    options = ("--rank", 2, "--calibrate", data, "--base", model)
    done = run(place, "squeeze", *options, "-o", tmp_path / "small", "--json")
    told = json.loads(done.stdout)
    dtype = getattr(torch, choose_precision(torch.device("cpu")))
    with subject(place, examples=48) as it:
        assert told["loss"] == pytest.approx(peft_loss(place, place.folder / "adapter", it.batches, dtype), rel=1e-4)
        assert told["loss_after"] == pytest.approx(peft_loss(place, tmp_path / "small", it.batches, dtype), rel=1e-4)
    done = run(place, "plan", *options)
    assert "measured, predicted +" in done.stdout
    done = run(place, "plan", *options, "--json")
    totals = json.loads(done.stdout)["totals"]
    assert totals["loss_after"] == pytest.approx(told["loss_after"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--base", "model"), "base is the model for calibrate; give examples, or leave it out"),
        (("--calibrate", "no.jsonl", "--base", "no/such"), "no.jsonl: no such file"),
        (("--calibrate", "no.safetensors"), "no.safetensors"),
        (("--calibrate", "no.safetensors", "--base", "model"), "holds statistics: no model is needed, leave out base"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    place: Place, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    done = command(tmp_path, "squeeze", place.folder / "adapter", "--rank", 2, *arguments, "-o", tmp_path / "small")
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1, done.err
    assert list(tmp_path.iterdir()) == []
