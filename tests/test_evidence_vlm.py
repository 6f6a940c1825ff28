"""The vision-language model of the bench and its pictures: what is drawn is what is asked, and LoRA stays in its place.

The handwriting here is made up, so that a picture can be read again from its pixels: each quarter of a digit is inked
or not, and the four of them are the bits of the digit plus one.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.evidence.data import PARTS
from bench.evidence.tasks import pictures
from bench.evidence.vlm import IMAGE_TOKENS, build, digits, image_token_id, pixels, tiny_vlm
from bench.evidence.vlm.canvas import CELL, CELLS, COLOURS, GRID, GROUNDS, SIDE, Mark, caption, draw, lottery
from bench.evidence.vlm.digits import Handwriting, divided
from bench.evidence.vlm.recipe import RECIPE, Recipe, Stage

ON_LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
QUARTERS = [(row, column) for row in (0, 1) for column in (0, 1)]


def code(digit: int) -> list[int]:
    """Ink of a made-up digit, row by row."""
    return [16 * bool((digit + 1) & 1 << (row // 4 * 2 + column // 4)) for row in range(8) for column in range(8)]


def rows() -> list[list[int]]:
    """Forty writers of each digit, told apart by how much ink their first and their last pixel have."""
    found = []
    for writer in range(40):
        for digit in range(10):
            ink = code(digit)
            inked = [place for place, value in enumerate(ink) if value]
            ink[inked[0]], ink[inked[-1]] = 16 - writer % 8, 16 - writer // 8
            found.append([*ink, digit])
    return found


@pytest.fixture(scope="module")
def writing() -> dict[str, Handwriting]:
    return divided(rows())


def read(picture: Tensor) -> dict[int, Mark]:
    """What stands in each cell, from the pixels."""
    image = picture.float()
    grounds = [image.new_tensor(ground) for ground in GROUNDS.values()]
    corners = image[:, :: SIDE - 1, :: SIDE - 1].flatten(1)
    ground = min(grounds, key=lambda found: (corners - found[:, None]).abs().sum(0).min().item())
    seen = {}
    for cell in range(GRID * GRID):
        top, left = (CELL * place for place in divmod(cell, GRID))
        points = [(top + 3 + 8 * row, left + 3 + 8 * column) for row, column in QUARTERS]
        tones = [image[:, y : y + 2, x : x + 2].mean((1, 2)) for y, x in points]
        inked = [(tone - ground).abs().max() > 60 for tone in tones]
        if any(inked):
            tone = torch.stack([tone for tone, is_inked in zip(tones, inked, strict=True) if is_inked]).mean(0)
            colour = min(COLOURS, key=lambda name: (tone - tone.new_tensor(COLOURS[name])).norm().item())
            seen[cell] = Mark(cell, sum(1 << bit for bit, is_inked in enumerate(inked) if is_inked) - 1, colour)
    return seen


# --- handwriting and pictures -----------------------------------------------------------------------------------------


def test_no_handwriting_is_in_two_parts() -> None:
    """Nor equal images, which are copied into the rows here."""
    copied = divided(rows() + rows()[::3])
    images = {part: {tuple(image.flatten().tolist()) for image in found.images} for part, found in copied.items()}
    assert sum(len(found.labels) for found in copied.values()) == len(rows()) + len(rows()[::3])
    assert all(images.values())
    for part in PARTS:
        assert not any(images[part] & images[other] for other in PARTS if other != part), part


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_the_digits_of_scikit_learn_are_read_whole() -> None:
    found = digits.handwriting()
    assert sum(len(part.labels) for part in found.values()) == 1797  # as its description says
    for part in found.values():
        assert part.images.shape[1:] == (8, 8) and 0 == part.images.min() and part.images.max() == 1
        assert set(part.labels.tolist()) == set(range(10))
        assert torch.equal(part.labels, part.labels.sort().values)


def test_another_file_of_digits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other digits")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "sklearn")]})
    monkeypatch.setattr(digits, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=rf"digits.csv.gz: expected sha256 {digits.SHA256}, found [0-9a-f]{{64}}: "):
        digits.digits_file()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps scikit-learn"):
        digits.digits_file()


def test_what_is_drawn_can_be_read_again(writing: dict[str, Handwriting]) -> None:
    scenes = lottery(300, 9, seed=5)
    for scene, picture in zip(scenes, draw(scenes, writing["test"], seed=6), strict=True):
        assert read(picture) == {mark.cell: mark for mark in scene}
    assert {len(scene) for scene in scenes} == set(range(1, 10))


def test_pictures_depend_on_their_seed_alone(writing: dict[str, Handwriting]) -> None:
    scenes = lottery(20, 4, seed=1)
    first = draw(scenes, writing["train"], seed=2)
    assert first.shape == (20, 3, SIDE, SIDE) and first.dtype == torch.uint8
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert torch.equal(first, draw(scenes, writing["train"], seed=2))
    assert not torch.equal(first, draw(scenes, writing["train"], seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert lottery(20, 4, seed=1) == scenes != lottery(20, 4, seed=2)


def test_a_caption_says_what_stands_there_in_reading_order() -> None:
    scene = (Mark(CELLS.index("middle"), 7, "blue"), Mark(CELLS.index("top left"), 3, "red"))
    assert caption(scene) == "red 3 top left, blue 7 middle"


# --- the ten tasks ----------------------------------------------------------------------------------------------------


def compared(seen: dict[int, Mark]) -> str:
    left, right = (seen[CELLS.index(side)].digit for side in ("left", "right"))
    return "equal" if left == right else "left" if left > right else "right"


def numbers(seen: dict[int, Mark]) -> list[int]:
    """Digits from left to right, from the top down."""
    return [seen[cell].digit for cell in sorted(seen)]


EXPECTED: dict[str, Callable[[dict[int, Mark], str], object]] = {
    "picture-digit": lambda seen, asked: numbers(seen)[0],
    "picture-parity": lambda seen, asked: ["even", "odd"][numbers(seen)[0] % 2],
    "picture-count": lambda seen, asked: len(seen),
    "picture-compare": lambda seen, asked: compared(seen),
    "picture-sum": lambda seen, asked: sum(numbers(seen)),
    "picture-difference": lambda seen, asked: max(numbers(seen)) - min(numbers(seen)),
    "picture-colour": lambda seen, asked: seen[min(seen)].colour,
    "picture-place": lambda seen, asked: CELLS[min(seen)],
    "picture-binding": lambda seen, asked: {mark.colour: mark.digit for mark in seen.values()}[asked],
    "picture-row": lambda seen, asked: "".join(map(str, numbers(seen))),
}
MARKS = {name: {3} for name in EXPECTED} | {
    "picture-digit": {1},
    "picture-parity": {1},
    "picture-place": {1},
    "picture-count": {1, 2, 3, 4, 5, 6},
    "picture-compare": {2},
    "picture-sum": {2},
    "picture-difference": {2},
}


@pytest.fixture
def few(writing: dict[str, Handwriting], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, drawn with the digits made up here."""
    monkeypatch.setattr(pictures, "handwriting", lambda: writing)
    monkeypatch.setattr(pictures, "digits_source", lambda: "made up")
    monkeypatch.setattr(pictures, "COUNTS", {"train": 120, "validation": 40, "test": 41})


def test_there_are_ten_tasks_of_some_size() -> None:
    assert list(pictures.PICTURES) == list(EXPECTED) and len(EXPECTED) == 10
    assert all(pictures.COUNTS[part] >= least for part, least in zip(PARTS, (3000, 512, 512), strict=True))


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.usefixtures("few")
def test_answers_are_those_of_the_pictures_at_every_call(name: str) -> None:
    data, again = pictures.PICTURES[name](), pictures.PICTURES[name]()
    assert data.name == name and data.source.startswith("made up; ")
    counts = set()
    for part in PARTS:
        examples = getattr(data, part)
        assert len(examples) == pictures.COUNTS[part] and examples == getattr(again, part)
        assert all(torch.equal(e.image, other.image) for e, other in zip(examples, getattr(again, part), strict=True))
        for example in examples:
            seen = read(example.image)
            counts.add(len(seen))
            assert example.answer == str(EXPECTED[name](seen, example.prompt.split(": ")[-1])), seen
    assert counts == MARKS[name]
    assert data.validation[:40] != data.test[:40]
    if data.classes:
        assert {example.answer for example in data.train} == set(data.classes)


@pytest.mark.usefixtures("few")
def test_a_part_is_drawn_with_its_own_handwriting(
    writing: dict[str, Handwriting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the handwriting of one part has no ink, the pictures of that part are empty and no others."""
    for blank in PARTS:
        without = {part: replace(w, images=w.images * (part != blank)) for part, w in writing.items()}
        monkeypatch.setattr(pictures, "handwriting", lambda found=without: found)
        data = pictures.PICTURES["picture-digit"]()
        assert {part: any(read(e.image) for e in getattr(data, part)) for part in PARTS} == {
            part: part != blank for part in PARTS
        }


def test_classes_are_equally_likely() -> None:
    """Within five standard deviations of what a fair lot gives."""
    for name, kind in pictures.KINDS.items():
        answers = [question.answer for question in pictures.questions(name, "train")]
        for answer in kind.classes:
            share = 1 / len(kind.classes)
            spread = (len(answers) * share * (1 - share)) ** 0.5
            assert abs(answers.count(answer) - len(answers) * share) < 5 * spread, (name, answer)


def test_room_for_prompts_and_answers_is_just_enough() -> None:
    """In tokens of SmolLM2, where it is at hand."""
    from transformers import AutoTokenizer

    from lora_squeeze.demo.model import find_model
    from lora_squeeze.errors import LoraSqueezeError

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(find_model().path, local_files_only=True)
    except LoraSqueezeError as error:
        pytest.skip(str(error))
    assert tokenizer.decode([image_token_id(tokenizer)]) == "<repo_name>"

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for name, kind in pictures.KINDS.items():
        asked = [question for part in PARTS for question in pictures.questions(name, part)[:300]]
        assert kind.prompt_tokens == max(length(question.prompt) for question in asked), name
        assert kind.answer_tokens == max(length(f" {question.answer}") for question in asked) + 1, name


# --- the model --------------------------------------------------------------------------------------------------------


def inputs(tokenizer: Any, pad: int = 0) -> dict[str, Tensor]:
    """Two pictures with prompt and answer, padded on the left."""
    text = tokenizer("left: red 3", add_special_tokens=False)["input_ids"]
    ids = [tokenizer.eos_token_id] * pad + [image_token_id(tokenizer)] * IMAGE_TOKENS + text
    mask = [0] * pad + [1] * (len(ids) - pad)
    shots = torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {
        "input_ids": torch.tensor([ids] * 2),
        "attention_mask": torch.tensor([mask] * 2),
        "pixel_values": pixels(list(shots)),
    }


def test_pixels_lie_between_minus_one_and_one() -> None:
    found = pixels([torch.full((3, SIDE, SIDE), value, dtype=torch.uint8) for value in (0, 255)])
    assert found.shape == (2, 3, SIDE, SIDE) and found.dtype == torch.float32
    assert found[0].eq(-1).all() and found[1].eq(1).all()


def test_a_picture_is_nine_tokens() -> None:
    model, tokenizer = tiny_vlm()
    given = inputs(tokenizer)
    found = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
    assert [tuple(picture.shape) for picture in found] == [(IMAGE_TOKENS, 32)] * 2
    short = {**given, "input_ids": given["input_ids"][:, 1:], "attention_mask": given["attention_mask"][:, 1:]}
    with pytest.raises(ValueError, match="tokens"):
        model(**short)


def test_padding_on_the_left_changes_nothing() -> None:
    model, tokenizer = tiny_vlm()
    with torch.no_grad():
        plain = model(**inputs(tokenizer), logits_to_keep=3, use_cache=False).logits
        padded = model(**inputs(tokenizer, pad=5), logits_to_keep=3, use_cache=False).logits
        other = model(**inputs(tokenizer) | {"pixel_values": -inputs(tokenizer)["pixel_values"]}, logits_to_keep=3)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**inputs(tokenizer, pad=5), logits_to_keep=3, use_cache=False).logits
    assert plain.shape == (2, 3, len(tokenizer))
    assert torch.allclose(plain, padded, atol=1e-4)
    assert not torch.allclose(plain, other.logits, atol=1e-3)  # the picture counts
    assert torch.allclose(plain, rough.float(), atol=0.02 * plain.abs().max().item())


def adapted(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=ON_LANGUAGE, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def test_lora_and_gradients_stay_on_the_language_model() -> None:
    model, tokenizer = tiny_vlm()
    assert model.model.language_model.config._attn_implementation == "eager"
    layers = model.config.text_config.num_hidden_layers
    adapter = adapted(model, rank=4)
    trained = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert len(trained) == layers * 7 * 2 and all("language_model" in name and "lora_" in name for name in trained)
    adapter(**inputs(tokenizer), logits_to_keep=3, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    moved = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert moved == trained


def test_its_lora_is_squeezed_in_place() -> None:
    from lora_squeeze.training.inplace import squeeze_

    model, tokenizer = tiny_vlm()
    adapter = adapted(model, rank=4)
    with torch.no_grad():
        before = adapter(**inputs(tokenizer)).logits
        done = squeeze_(adapter, 2)
        after = adapter(**inputs(tokenizer)).logits
    assert set(done.ranks.values()) == {2} and len(done.ranks) == model.config.text_config.num_hidden_layers * 7
    assert after.shape == before.shape and not torch.equal(after, before)
    assert all(p.shape[0] == 2 for name, p in adapter.named_parameters() if "lora_A" in name)


# --- the build --------------------------------------------------------------------------------------------------------

STAGES = ("seeing", "naming", "speaking")
SMALL = Recipe(
    seeing=Stage(steps=3, batch=4, rate=1e-3, most=9, seed=1),
    naming=Stage(steps=2, batch=4, rate=1e-3, most=4, seed=2),
    speaking=Stage(steps=2, batch=2, rate=1e-3, most=4, seed=3),
)


def test_the_tag_changes_with_whatever_decides_about_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, Any]] = [
        {"edition": 99},
        {"digits": "other"},
        {"tower": {**RECIPE.tower, "hidden_size": 48}},
    ]
    changes += [{name: replace(getattr(RECIPE, name), seed=99)} for name in STAGES]
    tags = [
        RECIPE.tag("model"),
        RECIPE.tag("other model"),
        *(replace(RECIPE, **change).tag("model") for change in changes),
    ]
    assert len(set(tags)) == len(tags)
    assert RECIPE.tag("model") == Recipe().tag("model")
    monkeypatch.setattr("bench.evidence.vlm.recipe.version", lambda name: "0")
    assert RECIPE.tag("model") not in tags


@pytest.fixture
def house(tmp_path: Path, writing: dict[str, Handwriting], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and builds that end in the tiny model."""
    from lora_squeeze.demo import model as demo

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_model", lambda say: demo.ModelFolder(tmp_path, "none"))
    monkeypatch.setattr(build, "with_language_model", lambda tower, seed: tiny_vlm())
    monkeypatch.setattr(build, "handwriting", lambda: writing)
    monkeypatch.setattr(build, "digits_source", lambda: "made up")
    return tmp_path / "lora-squeeze"


def test_weights_are_made_once(house: Path) -> None:
    said: list[str] = []
    folder = build.built(said.append, SMALL)
    assert folder == house / f"vlm-{SMALL.tag('none')}" and said
    assert sorted(path.name for path in folder.iterdir()) == [build.CARD, build.WEIGHTS]
    card = json.loads((folder / build.CARD).read_text())
    assert Recipe(**card["recipe"] | {name: Stage(**card["recipe"][name]) for name in STAGES}) == SMALL
    for stage, figure in (("seeing", "digit"), ("naming", "caption"), ("speaking", "caption digit")):
        assert card[stage]["seconds"] >= 0 and all(0 <= card[stage][part][figure] <= 1 for part in PARTS)
    said.clear()
    assert build.built(said.append, SMALL) == folder and not said


def test_each_training_changes_its_own_part(writing: dict[str, Handwriting]) -> None:
    model, tokenizer = tiny_vlm()
    trainings = (
        ("vision_tower", SMALL.seeing, partial(build.train_tower, model.model.vision_tower)),
        ("multi_modal_projector", SMALL.naming, partial(build.train_names, model, tokenizer)),
        ("multi_modal_projector", SMALL.speaking, partial(build.train_captions, model, tokenizer)),
    )
    for part, stage, train in trainings:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(writing["train"], stage, lambda text: None)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.split(".")[1] for name in changed} == {part}, stage


def test_a_build_that_was_cut_goes_on_and_ends_the_same(
    house: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = (build.built(lambda text: None, SMALL) / build.WEIGHTS).read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    with monkeypatch.context() as cut:
        cut.setattr(build, "train_captions", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.built(lambda text: None, SMALL)
    assert not (tmp_path / "second" / "lora-squeeze" / f"vlm-{SMALL.tag('none')}").exists()
    with monkeypatch.context() as never:
        never.setattr(build, "train_tower", lambda *given: pytest.fail("the tower was trained a second time"))
        assert (build.built(lambda text: None, SMALL) / build.WEIGHTS).read_bytes() == whole
