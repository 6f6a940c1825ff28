"""mlx-lm reads what is written here, and answers as PEFT does with the adapter that it was made from.

On the processor mlx takes a quarter of a second for each token of prompt and answer, so few of them are asked for.
"""

from pathlib import Path

import adapters
import pytest
from reference import FAR, Answer, Reference
from worker import run

import lora_squeeze
from lora_squeeze.demo.model import ModelFolder

TOKENS = 8
PROMPTS = adapters.prompts()[::3]
PEFT = {"source": "source", "energy": "energy", "rank 8 of mlx": "rank-8"}  # which PEFT folder each is compared with


@pytest.fixture(scope="module")
def answers(
    python: Path,
    base: ModelFolder,
    made: dict[str, Path],
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[Answer]]:
    """Of two converted adapters, one of them with mixed ranks, and of one that was squeezed after the conversion."""
    folder = tmp_path_factory.mktemp("mlx")
    for name in ("source", "energy"):
        lora_squeeze.convert(lora_squeeze.load(str(made[name])), "mlx").save(folder / name)
    lora_squeeze.load(str(folder / "source")).squeeze(rank=8).save(folder / "rank 8 of mlx")
    prompts = [reference.prompt(text) for text in PROMPTS]
    job = {"model": str(base.path), "adapters": [str(folder / name) for name in PEFT], "prompts": prompts}
    said = run(python, "mlx_lm_run", {**job, "tokens": TOKENS})
    return {name: [Answer.from_json(one) for one in ones] for name, ones in zip(PEFT, said, strict=True)}


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_answers_as_in_peft(
    answers: dict[str, list[Answer]], made: dict[str, Path], reference: Reference, name: str
) -> None:
    reference.check(made[PEFT[name]], PROMPTS, answers[name], TOKENS)


def test_the_comparison_tells_adapters_apart(
    answers: dict[str, list[Answer]], made: dict[str, Path], reference: Reference
) -> None:
    assert reference.compare(made["source"], answers["rank 8 of mlx"]).apart > FAR
    assert reference.compare(made["rank-8"], answers["source"]).apart > FAR
