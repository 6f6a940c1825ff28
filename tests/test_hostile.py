"""No file does harm: it is read or refused in one printable line, within bounds of time and memory, and nothing else.

Each case runs in a fork of its own, which is cut off where it leaves the bounds.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import plain_config, write_folder
from folder_cases import tree
from hostile_cases import CANARY, Hostile
from hostile_formats import CASES
from hostile_reader import loop

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import expressions
from lora_squeeze.formats.expressions import Expression
from lora_squeeze.formats.patterns import Patterns

sys.path.append(str(Path(__file__).parent.parent))
targets = pytest.importorskip("fuzz.targets", reason="the folder fuzz/ is not in this distribution")
from fuzz.corpus import seeds  # noqa: E402
from fuzz.mutate import mutate  # noqa: E402

LOOPS, MEGABYTES = 400, 300  # about two seconds of a processor; memory above what there was
TRIES = 3  # the quickest counts: on a busy machine, processor time is not of one's own work alone
MUTATIONS = 15  # of each target


@dataclass(frozen=True)
class Reader:
    """hostile_reader.py, waiting for requests."""

    process: "subprocess.Popen[str]"

    def __call__(self, case: Hostile, path: Path, out: Path) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([case.reader, str(path), str(out)]) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    place = tmp_path_factory.mktemp("reader")
    script = Path(__file__).with_name("hostile_reader.py")
    words = [sys.executable, str(script), str(write_folder(place / "in")), str(place / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Reader(process)
        assert process.stdin
        process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hostile_file_is_read_or_refused_and_nothing_else_happens(
    tmp_path: Path, reader: Reader, case: Hostile
) -> None:
    path = case.build(tmp_path / "in")
    before = tree(tmp_path)
    found = reader(case, path, tmp_path / "out")
    assert "other" not in found, found["other"]
    for n in range(1, TRIES):
        if found["loops"] >= LOOPS:
            found["loops"] = min(found["loops"], reader(case, path, tmp_path / f"out {n}")["loops"])
    assert found["loops"] < LOOPS and found["megabytes"] < MEGABYTES, found
    assert not [path for path in tmp_path.rglob("*") if CANARY in path.name], "no code has run"
    assert {
        name: facts for name, facts in tree(tmp_path).items() if not name.startswith(f"{tmp_path / 'out'}")
    } == before
    assert (tmp_path / "out").exists() == ("read" in found and case.reader in ("adapter", "plan"))
    if case.fragments:
        message = found["refused"]
        assert message.isprintable() and len(message) < 1000, message
        assert all(fragment in message for fragment in case.fragments), message
    else:
        assert all(line.isprintable() for line in found["read"]), found


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_link_that_leads_out_is_not_copied_into_what_is_written(tmp_path: Path, name: str) -> None:
    folder = CASES["tokenizer_is_a_link_to_a_secret"].build(tmp_path / "in")
    adapter = lora_squeeze.load(folder)
    adapter.squeeze(rank=1).save(tmp_path / "out")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"top secret" in (folder / name).read_bytes() and b"top secret" not in written
    assert f"{name}: a link that leads out of the folder; it is not copied" in adapter.notes


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    folder = CASES["weights_linked_as_in_the_cache_of_the_hub"].build(tmp_path / "in")
    lora_squeeze.load(folder).squeeze(rank=1).save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_rank_of_its_own_for_each_of_three_hundred_modules_is_looked_up_at_once(tmp_path: Path) -> None:
    tensors, ranks = {}, {}
    for i in range(300):
        name, rank = f"layers.{i}.q_proj", 1 + i % 5
        tensors |= {f"base_model.model.{name}.lora_A.weight": torch.ones(rank, 4)}
        tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(4, rank)}
        ranks[f"^layers\\.{i}\\.q_proj"] = rank
    write_folder(tmp_path / "in", tensors, plain_config(r=5, lora_alpha=5, rank_pattern=ranks, alpha_pattern=ranks))
    start = time.process_time()
    adapter = lora_squeeze.load(tmp_path / "in")
    assert time.process_time() - start < LOOPS * loop()
    assert all(adapter.modules[f"layers.{i}.q_proj"].rank == 1 + i % 5 for i in range(300)) and not adapter.notes


def test_a_file_that_is_no_adapter_leaves_the_limits_of_the_process_alone(tmp_path: Path) -> None:
    """The bounds are the reader's own: no limit of the system, no alarm is set."""
    alarm, limits = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    folder = CASES["slow_rank_pattern_0"].build(tmp_path / "in")
    lora_squeeze.load(folder)
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == (alarm, limits)


# --- expressions ----------------------------------------------------------------------------------------------------

ATOMS = (
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "(?:a|b.)", "(ab)?", r"\b", "^", "$", "(?=a)", "(?!ab)",
    "(?<=a)", "(?<!b)", "a{2}", "(?:a?){3}", "[a-c]", "(?i:A)", "(a|)*", "(?:a|b)*?", r"\B", "(?s:.)",
)  # fmt: skip
COUNTS = ("", "", "", "*", "+", "?", "{1,2}", "{0,3}", "{2,}")
NAMES = ("a", "b", r"\.", ".", "q_proj", "a.b", "^a", r"^a\.b", "(a|b)", "a$", ".*", r"\-", "-", "a|b", "[ab]", "]")


def compiles(pattern: str) -> bool:
    """Whether `re` takes it; of possessive and atomic parts, which are refused here, there are none."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return not re.search(r"[*+?}]\+", pattern)


def test_expressions_match_what_re_matches() -> None:
    choice, hits = random.Random(1), 0
    for _ in range(250):
        pattern = "".join(choice.choice(ATOMS) + choice.choice(COUNTS) for _ in range(choice.randint(1, 5)))
        if not compiles(pattern):
            continue
        expression = Expression(pattern)
        for _ in range(4):
            text = "".join(choice.choice("ab.c1") for _ in range(choice.randint(1, 8)))
            for to_end, theirs in ((True, re.fullmatch), (False, re.match)):
                expected = theirs(pattern, text) is not None
                assert expression.matches(text, to_end=to_end) == expected, (pattern, text, to_end)
                hits += expected
    assert hits > 200


def test_patterns_are_found_as_peft_tries_them_one_after_another() -> None:
    choice, hits = random.Random(2), 0
    for _ in range(80):
        spelled = {"".join(choice.choice(NAMES) for _ in range(choice.randint(1, 3))) for _ in range(4)}
        patterns = {pattern: i for i, pattern in enumerate(sorted(spelled)) if compiles(pattern)}
        found = Patterns(patterns)
        theirs = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
        for _ in range(12):
            path = ".".join(choice.choice(("a", "b", "ab", "q_proj", "a-", "]")) for _ in range(choice.randint(1, 3)))
            expected = [value for pattern, value in theirs if pattern.match(path)]
            assert found.value(path, 99) == (expected or [99])[0], (patterns, path)
            assert found.values_of(path) == set(expected)
            hits += bool(expected)
    assert hits > 200


@pytest.mark.parametrize("pattern", [r"(a)\1", "(a)?(?(1)b|c)", "(?>a)", "a++"])
def test_an_expression_that_takes_backtracking_is_refused(pattern: str) -> None:
    with pytest.raises(LoraSqueezeError, match="write it without one, or names"):
        Expression(pattern)


def test_an_expression_that_takes_too_many_steps_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_MAX_STEPS", 1000)
    expression = Expression(".*a.*b")
    with pytest.raises(LoraSqueezeError, match="takes too long to match; write a simpler one, or names"):
        for i in range(1000):
            expression.matches(f"{i}ab")


# --- the targets of the fuzzer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_sound_file_of_the_corpus_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that is refused would fuzz nothing but the first check."""

    def unexpected(error: LoraSqueezeError) -> None:
        raise AssertionError("a sound file is refused") from error

    monkeypatch.setattr(targets, "check_message", unexpected)
    for data in seeds()[name].values():
        targets.TARGETS[name](data)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations_of_sound_files_break_no_promise(name: str) -> None:
    choice, inputs = random.Random(name), list(seeds()[name].values())
    for _ in range(MUTATIONS):
        targets.TARGETS[name](mutate(choice.choice(inputs), choice))


def test_the_targets_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(_: os.PathLike[str]) -> Any:
        raise LoraSqueezeError("found \x1b[31m")

    monkeypatch.setattr(lora_squeeze, "load", careless)
    with pytest.raises(targets.Broken, match="harmless: False"):
        targets.TARGETS["peft"](seeds()["peft"]["plain"])
