"""PEFT's other methods as plain LoRA: their updates are those of PEFT's own merge, and PEFT computes the same."""

from functools import cache
from pathlib import Path

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


def test_a_classifier_is_built_with_the_labels_of_the_adapters_head(tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from lora_squeeze.base_model import open_base
    from lora_squeeze.formats.peft_methods import load
    from lora_squeeze.methods.adapters import LoraXsConfig

    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "base")  # two labels
        five = BertForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
        )
        model = get_peft_model(five, LoraXsConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS"))
        for name, parameter in model.named_parameters():
            if "loraxs_delta" in name:
                parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    found = load(tmp_path / "adapter", base=open_base(str(tmp_path / "base")))
    wanted = {name: m.get_delta_weight("default") for name, m in model.named_modules() if hasattr(m, "deltas")}
    assert len(found.modules) == len(wanted) == 2
    for name, dW in wanted.items():
        lora = found.update(name.removeprefix("base_model.model."))
        torch.testing.assert_close(lora.dense().to(dW), dW.detach(), rtol=1e-5, atol=1e-6)
