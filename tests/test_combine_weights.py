"""Weights of a sum, one for each adapter or by module."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    SHAPES,
    dense,
    read_dense,
)
from combine_cases import NUMBERS, RANKS, made, total

from lora_squeeze.adapter import Adapter
from lora_squeeze.combine import merge
from lora_squeeze.combine_weights import parse_weights
from lora_squeeze.errors import LoraSqueezeError

BLOCKS = {"layers.0.*": [1.0, 0.0, 0.5], "*.q_proj": [0.0, 2.0, 0.0], "default": -0.5}


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    """Different ranks and scales."""
    return [made(tmp_path / f"in {i}", rank, i, lora_alpha=4 + 3 * i) for i, rank in enumerate(RANKS)]


def test_weights_by_module_take_the_first_pattern_that_matches(three: list[Adapter]) -> None:
    both = merge(three, BLOCKS)
    rows = {
        "layers.0.q_proj": BLOCKS["layers.0.*"],
        "layers.0.v_proj": BLOCKS["layers.0.*"],
        "layers.1.q_proj": BLOCKS["*.q_proj"],
        "layers.1.down_proj": [BLOCKS["default"]] * 3,
    }
    for name in SHAPES:
        torch.testing.assert_close(dense(both, name), total(three, rows[name], name), rtol=1e-5, atol=1e-6)
    assert both.modules["layers.1.q_proj"].rank == RANKS[1], "a weight of zero costs no rank"


def test_numbers_of_other_libraries_are_numbers(three: list[Adapter], tmp_path: Path) -> None:
    """In a process without this suite's type checker, which lets only some of them pass."""
    code = f"""
import numpy as np
import torch
import lora_squeeze
from lora_squeeze.combine import merge, rank_up
three = [lora_squeeze.load(f"in {{i}}") for i in range(3)]
plain = merge(three, {NUMBERS})
for numbers in (np.array({NUMBERS}), torch.tensor({NUMBERS}, dtype=torch.float64), list(np.array({NUMBERS}))):
    both = merge(three, numbers)
    assert both.history == plain.history
    assert all(torch.equal(both.update(name).B, plain.update(name).B) for name in plain.modules)
rank_up(three[0], np.int64(20)).save("wide")
assert lora_squeeze.load("wide").rank == 20
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_module_without_weight_becomes_zero(three: list[Adapter], tmp_path: Path) -> None:
    merge(three, {"*.v_proj": 0, "default": 1}, rank=4).save(tmp_path / "out")
    assert not read_dense(tmp_path / "out", "layers.0.v_proj").any()
    assert read_dense(tmp_path / "out", "layers.0.q_proj").any()


@pytest.mark.parametrize("name", ["blocks.toml", "blocks.json"])
def test_a_file_says_the_same(three: list[Adapter], tmp_path: Path, name: str) -> None:
    lines = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in BLOCKS.items()]
    (tmp_path / name).write_text("\n".join(lines) if name.endswith("toml") else json.dumps(BLOCKS))
    weights = parse_weights(str(tmp_path / name))
    assert weights == BLOCKS
    assert all(torch.equal(dense(merge(three, weights), n), dense(merge(three, BLOCKS), n)) for n in SHAPES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: 1 numbers for 3 adapters; give one per adapter"),
        ([0.0, 0.0, 0.0], "all weights are zero, which leaves nothing to add"),
        ({"default": 0}, "all weights are zero, which leaves nothing to add"),
        ([1.0, 10**400, 1.0], "weights must be finite numbers, one per adapter"),
        ([1.0, True, 1.0], "weights must be finite numbers, one per adapter"),
        ([1.0, math.nan, 1.0], "weights must be finite numbers, one per adapter"),
        ({"default": [1, 2]}, "weights of 'default': 2 numbers for 3 adapters"),
        ({"default": [1, 2, 3], "*.k_proj": 1}, "weights of '*.k_proj': no module has such a name; names are like"),
        ({"*.q_proj": 1}, "no weights for module 'layers.0.v_proj': no pattern matches it; add default"),
    ],
)
def test_weights_that_make_no_sum_are_refused(three: list[Adapter], weights: Any, message: str) -> None:
    with pytest.raises(LoraSqueezeError, match=re.escape(message)):
        merge(three, weights)


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("0.7;0.5", None, "weights '0.7;0.5' are not understood"),
        ("missing.toml", None, "missing.toml: no readable TOML"),
        ("broken.json", "{", "broken.json: no readable TOML, or JSON in a .json file"),
        ("list.json", "[1, 2]", "list.json: expected a table of patterns and weights, found list"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(text).write_text(content)
    with pytest.raises(LoraSqueezeError, match=re.escape(message)):
        parse_weights(text)
