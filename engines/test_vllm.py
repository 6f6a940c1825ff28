"""vLLM serves what is written here, asked by the openai client, and answers as PEFT does with the same folder.

Everything in float32. The answers have to be PEFT's greedy answers token by token, and the logarithms of the
probabilities of the five likeliest tokens at every step have to be equal to reference.NEAR.
"""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import adapters
import pytest
from reference import FAR, Answer, Reference
from vllm_server import Server, serving, start_options
from worker import run

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.demo.model import ModelFolder
from lora_squeeze.fleet.members import Shape
from lora_squeeze.fleet.memory import slot_parameters, targets
from lora_squeeze.servers import server_of
from lora_squeeze.sources import open_source

TOKENS = 16
LIMIT, SMALL_LIMIT = 64, 8
ONE_SCALE = "sglang"  # a reader with one scale for all modules, by the rules of `check`
PROMPTS = adapters.prompts()


@pytest.fixture(scope="module")
def server(
    python: Path, base: ModelFolder, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server with all adapters."""
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    options = start_options(lora_squeeze.load(str(made["source"])), LIMIT, slots=len(made))
    with serving(python, base.path, made, log, options) as running:
        yield running


def ask(server: Server, name: str) -> list[Answer]:
    return server.ask([(name, prompt) for prompt in PROMPTS], TOKENS)


def test_the_base_model_answers_as_in_transformers(server: Server, base: ModelFolder, reference: Reference) -> None:
    """Otherwise the others say nothing about adapters."""
    reference.check(None, PROMPTS, ask(server, str(base.path)), TOKENS)


@pytest.mark.parametrize("name", adapters.NAMES)
def test_an_adapter_answers_as_in_peft(server: Server, made: dict[str, Path], reference: Reference, name: str) -> None:
    reference.check(made[name], PROMPTS, ask(server, name), TOKENS)
    assert lora_squeeze.check(made[name], "vllm", max_rank=LIMIT)[0].read_as_meant


def test_the_comparison_tells_adapters_apart(server: Server, made: dict[str, Path], reference: Reference) -> None:
    whole, small = ask(server, "source"), ask(server, "rank-4")
    assert reference.compare(made["rank-4"], whole).apart > FAR
    assert reference.compare(made["source"], small).apart > FAR
    assert reference.compare(None, small).behind > FAR


def test_adapters_of_many_ranks_answer_in_one_batch_as_they_do_alone(
    server: Server, made: dict[str, Path], reference: Reference
) -> None:
    together, over = set[str](), threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for names in re.findall(r'running_lora_adapters="([^"]+)"', server.get("/metrics")):
                together.add(names)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        pairs = [(name, prompt) for prompt in PROMPTS[:2] for name in made]
        answers = server.ask(pairs, TOKENS)
    finally:
        over.set()
        watcher.join()
    for name in made:
        own = [answer for answer, (asked, _) in zip(answers, pairs, strict=True) if asked == name]
        reference.check(made[name], PROMPTS[:2], own, TOKENS)
    most = max((names.split(",") for names in together), key=len)
    ranks = {lora_squeeze.load(str(made[name])).rank for name in most}
    assert len(ranks) > 3, f"adapters that were seen to run together: {most}"


def test_adapters_come_and_go_while_the_server_runs(
    server: Server, made: dict[str, Path], reference: Reference
) -> None:
    for folder in (made["rank-8"], made["energy"]):  # the second one takes the name of the first
        assert server.load("guest", folder) is None
        assert "guest" in server.models()
        reference.check(folder, PROMPTS, ask(server, "guest"), TOKENS)
        assert server.unload("guest") is None
        assert "guest" not in server.models()
        with pytest.raises(RuntimeError, match="The model `guest` does not exist"):
            ask(server, "guest")
    reference.check(made["source"], PROMPTS, ask(server, "source"), TOKENS)


@pytest.mark.parametrize("name", ["patterns-copy", "patterns-energy", "energy", "size"])
def test_what_is_written_needs_no_reader_that_knows_patterns(
    server: Server, made: dict[str, Path], reference: Reference, name: str, tmp_path: Path
) -> None:
    """vLLM 0.32 reads both patterns, servers before it read neither: they see the folder without them."""
    assert server.load("bare", adapters.without_patterns(made[name], tmp_path / "bare")) is None
    reference.check(made[name], PROMPTS, ask(server, "bare"), TOKENS)
    assert server.unload("bare") is None
    assert lora_squeeze.check(made[name], ONE_SCALE)[0].read_as_meant


def test_an_adapter_with_several_scales_does(
    server: Server, made: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """As it comes from training: one scale for all makes another function of it, until it is copied or squeezed."""
    assert server.load("bare", adapters.without_patterns(made["patterns"], tmp_path / "bare")) is None
    found = reference.compare(made["patterns"], ask(server, "bare"))
    print(found)
    assert found.apart > FAR and found.behind > FAR
    assert server.unload("bare") is None
    assert not lora_squeeze.check(made["patterns"], ONE_SCALE)[0].read_as_meant


def test_a_rank_above_the_limit_is_refused_until_it_is_squeezed(
    python: Path, base: ModelFolder, made: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    whole = lora_squeeze.load(str(made["source"]))
    options = start_options(whole, SMALL_LIMIT, slots=2)
    with serving(python, base.path, {}, tmp_path / "log.txt", options) as server:
        for name in ("source", "energy"):
            rank = lora_squeeze.load(str(made[name])).rank
            refusal = server.load(name, made[name]) or ""
            assert f"LoRA rank {rank} is greater than max_lora_rank {SMALL_LIMIT}." in refusal
            assert not lora_squeeze.check(made[name], "vllm", max_rank=SMALL_LIMIT)[0].read_as_meant
        small = whole.squeeze(energy=0.9, max_rank=SMALL_LIMIT)
        assert len({module.rank for module in small.modules.values()}) > 1
        small.save(tmp_path / "small")
        assert lora_squeeze.check(tmp_path / "small", "vllm", max_rank=SMALL_LIMIT)[0].read_as_meant
        assert server.load("small", tmp_path / "small") is None
        reference.check(tmp_path / "small", PROMPTS, ask(server, "small"), TOKENS)


def test_trained_tokens_answer_as_in_peft_once_they_are_modules(
    python: Path, base: ModelFolder, made: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """The head too, which is tied to the embedding: PEFT trains the rows of both."""
    tokens = sorted({token for prompt in PROMPTS for token in reference.prompt(prompt)})[::7][:SMALL_LIMIT]
    trained = adapters.with_tokens(made["rank-8"], base.path, tokens, tmp_path / "trained")
    assert not lora_squeeze.check(trained, "vllm")[0].read_as_meant
    adapter = open_source(trained, base=base.path, vocabulary="lora")
    convert(adapter, "peft", rank=SMALL_LIMIT).save(tmp_path / "modules")
    found = lora_squeeze.load(tmp_path / "modules")
    assert {"model.embed_tokens", "lm_head"} < found.modules.keys() and found.rank == SMALL_LIMIT
    with serving(python, base.path, {}, tmp_path / "log.txt", start_options(found, SMALL_LIMIT, slots=1)) as server:
        assert server.load("trained", trained) is not None
        assert server.load("modules", tmp_path / "modules") is None
        answers = ask(server, "modules")
    reference.check(trained, PROMPTS, answers, TOKENS)
    assert reference.compare(made["rank-8"], answers).apart > FAR


def test_the_limits_that_are_said_of_it_are_its_own(python: Path) -> None:
    limits, default = run(python, "vllm_limits", None)
    assert (tuple(limits), default) == (server_of("vllm").limits, server_of("vllm").default)


def test_its_slots_take_the_memory_that_the_rule_of_fleets_says(
    python: Path, base: ModelFolder, made: dict[str, Path]
) -> None:
    """Also where adapters change one layer of a pack only: then the others have slots too."""
    modules = lora_squeeze.load(str(made["source"])).modules.values()
    changed = ("gate_proj", "o_proj", "v_proj")
    shapes = {m.name: Shape(m.out_features, m.in_features) for m in modules if m.name.endswith(changed)}
    numbers, guesses = slot_parameters(shapes, server_of("vllm"))
    assert guesses == ()
    rank, slots, bytes_each = 8, 3, 4
    job = {"model": str(base.path), "max_lora_rank": rank, "max_loras": slots, "targets": targets(shapes)}
    assert run(python, "vllm_slots", job) == bytes_each * rank * slots * numbers
