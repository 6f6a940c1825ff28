"""PEFT's other methods as plain LoRA: their updates are those of PEFT's own merge, and PEFT computes the same."""

from functools import cache

import pytest
import torch
from peft_methods_cases import METHODS, Made, made, on_base, outputs
from torch import Tensor, nn

ROUNDING = 2.0**-22  # of the base weight: PEFT's merge is in float32
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """The adapters by name, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("methods")

    @cache
    def find(name: str) -> Made:
        if METHODS[name].needs:
            pytest.importorskip(METHODS[name].needs)
        return made(METHODS[name], folder / name.replace(", ", "-").replace(" ", "_"))

    return find


def like(matrix: Tensor, layer: nn.Module) -> Tensor:
    """An update's matrix in the shape of the layer's weight."""
    turned = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    return (matrix.mT if turned else matrix).reshape(layer.weight.shape)


def tolerance(delta: Tensor, layer: nn.Module) -> float:
    """What rounding may do to an entry of the update; far below its entries, or the test could not fail."""
    allowed = TOLERANCE * float(delta.abs().max()) + ROUNDING * float(layer.weight.detach().abs().max())
    assert allowed < 1e-2 * float(delta.abs().max())
    return allowed


@pytest.mark.parametrize("name", METHODS)
def test_the_update_is_what_pefts_merge_adds(source, name):
    made = source(name)
    weights = dict(made.base.named_modules())
    for module in made.adapter.modules.values():
        expected, layer = made.delta(module.name), weights[module.name]
        error = float((like(made.adapter.update(module.name).dense(), layer) - expected).abs().max())
        assert error < tolerance(expected, layer), f"{module.name}: {error:.1e}"


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_that_the_merge_changes_is_a_module_or_carried(source, name):
    made = source(name)
    told = {f"{n}.weight" for n in made.adapter.modules}
    told |= {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in made.adapter.extras}
    told = {key.replace(".lora_B.bias", ".bias") for key in told}
    changed = {n for n, p in made.merged.named_parameters() if not torch.equal(p, made.base.get_parameter(n))}
    assert changed <= told


@pytest.mark.parametrize("name", METHODS)
def test_the_rank_is_the_one_told_and_no_larger_than_the_matrix(source, name):
    made = source(name)
    for module in made.adapter.modules.values():
        assert made.adapter.update(module.name).rank == module.rank <= min(module.out_features, module.in_features)
        delta = made.delta(module.name)
        beyond = torch.linalg.svdvals(delta.flatten(1))[module.rank :]
        # Rounding is noise of full rank.
        allowed = tolerance(delta, made.base.get_submodule(module.name)) * sum(delta.flatten(1).shape)
        assert beyond.sum() < allowed * max(1, len(beyond))


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same_with_the_lora_that_is_written(source, name, tmp_path):
    made = source(name)
    made.adapter.save(tmp_path / "lora")
    effect = float((made.logits - outputs(made.base, made.method)).abs().max())
    error = float((outputs(on_base(made.method, tmp_path / "lora"), made.method) - made.logits).abs().max())
    assert error < TOLERANCE * effect + 1e-6 < 1e-2 * effect, f"{error:.1e} of {effect:.1e}"
