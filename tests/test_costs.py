"""The cost bench: what is counted of one layer by hand, a LoRA against itself, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.costs.__main__ import main
from bench.costs.measure import Bench
from bench.costs.methods import lora, methods
from bench.costs.saved import saved_bytes
from bench.evidence.learners import causal
from lora_squeeze.methods.catalogue import CATALOGUE

ROWS, IN, OUT = 6, 16, 24
FLOAT, HALF = torch.float32.itemsize, torch.bfloat16.itemsize


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(0))


def test_a_trained_linear_layer_keeps_its_input_and_no_parameter(x: torch.Tensor) -> None:
    layer = nn.Linear(IN, OUT)
    assert saved_bytes(layer, lambda: layer(x).sum()).activations == ROWS * IN * FLOAT


def test_a_frozen_linear_layer_keeps_nothing(x: torch.Tensor) -> None:
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    found = saved_bytes(layer, lambda: layer(x.clone().requires_grad_()).sum())
    assert (found.activations, found.layers, found.copies) == (0, 0, 0)


def test_an_input_that_two_layers_keep_counts_once_and_a_slice_counts_whole(x: torch.Tensor) -> None:
    pair = nn.ModuleList([nn.Linear(IN, OUT), nn.Linear(IN, OUT)])
    assert saved_bytes(pair, lambda: pair[0](x).sum() + pair[1](x).sum()).activations == ROWS * IN * FLOAT
    assert saved_bytes(pair, lambda: pair[0](x[:2]).sum()).activations == ROWS * IN * FLOAT


def test_the_copy_that_autocast_makes_of_a_frozen_weight_is_counted_apart(x: torch.Tensor) -> None:
    layer = nn.Linear(IN, OUT).requires_grad_(False)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = layer(x.clone().requires_grad_()).sum()
        return found

    found = saved_bytes(layer, forward)
    assert found.copies == IN * OUT * HALF
    assert found.activations == 0


def test_the_parts_of_a_sparse_tensor_are_counted(x: torch.Tensor) -> None:
    weight = nn.Parameter(torch.randn(IN, OUT))
    index = torch.tensor([[0, 1, 2], [0, 1, 2]])
    values = torch.ones(3, requires_grad=True)
    model = nn.ParameterList([weight])

    def forward() -> torch.Tensor:
        sparse = torch.sparse_coo_tensor(index, values, (ROWS, IN), check_invariants=True)
        found: torch.Tensor = torch.sparse.mm(sparse, weight).sum()
        return found

    kept = values.numel() * FLOAT + index.numel() * torch.int64.itemsize
    assert saved_bytes(model, forward).activations == kept


def test_every_method_of_the_catalogue_has_a_row() -> None:
    labels = [method.label for method in methods()]
    assert len(set(labels)) == len(labels)
    assert {entry.title for entry in CATALOGUE} <= set(labels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_lora_against_itself_costs_the_same(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(causal, "choose_precision", lambda device: precision)
    row = Bench("tiny").row(lora(8))
    assert row["lora_rank"] == 8
    for name in ("numbers", "saved_bytes", "saved_in_layers_bytes", "copies_bytes", "state_bytes", "file_bytes"):
        assert row[name] == row[f"lora_{name}"], name
        copied = name != "copies_bytes" or precision == "bfloat16"  # in float32 no weight is
        assert (row[name] > 0) == copied, name
    numbers = row["numbers"]
    assert 2 * numbers * FLOAT <= row["state_bytes"] <= 2.01 * numbers * FLOAT
    assert row["frozen_bytes"] == 0


def test_a_run_is_cut_and_goes_on_and_the_page_has_all_rows(tmp_path: Path) -> None:
    def run(*names: str) -> list[dict[str, Any]]:
        main(["--model", "tiny", "--out", str(tmp_path), "--methods", *names])
        lines = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "cost"]

    first = run("PaCA")
    both = run("PaCA", "LIFT")
    assert both[0] == first[0]
    assert [row["method"] for row in both] == ["PaCA", "LIFT"]
    paca, lift = both
    assert paca["saved_in_layers_bytes"] < paca["lora_saved_in_layers_bytes"]
    assert lift["rare"]["every"] == 400
    page = (tmp_path / "README.md").read_text()
    assert "| PaCA" in page
    assert "| LIFT" in page
