"""A LoRA out of two checkpoints: the difference itself, which tensors it is of, and what is said of the others."""

import re
from pathlib import Path

import pytest
import torch
from dense_cases import (
    INDEX,
    LAYERS,
    TOKENS,
    Checkpoint,
    dense,
    extracted,
    integers,
    note_of,
    planted,
    two_models,
    with_tokens,
    write,
)

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense import extract

# --- the difference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_planted_update_is_found_at_its_rank(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    tuned, base = two_models(dtype)
    adapter = extract(write(tmp_path / "tuned", tuned, shards), write(tmp_path / "base", base, 2), max_rank=2)
    assert set(adapter.modules) == set(LAYERS)
    for name, shape in LAYERS.items():
        module, dW = adapter.modules[name], tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        assert (module.rank, module.out_features, module.in_features) == (2, *shape)
        assert (module.dtype, module.scale, module.kind) == (dtype, 1.0, "linear")
        assert dense(adapter, name).sub(dW).norm() <= 1e-6 * dW.norm()
        assert module.layout.difference.norm == pytest.approx(float(dW.norm()))


def test_without_a_bound_the_update_is_the_difference_itself(tmp_path: Path) -> None:
    tuned, base = two_models()
    tuned = {key: t + torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) for key, t in tuned.items()}
    adapter = extracted(tmp_path, tuned, base, max_rank=None)
    for name, shape in LAYERS.items():
        assert adapter.modules[name].rank == min(shape)
        assert torch.equal(adapter.update(name).dense(), tuned[f"{name}.weight"] - base[f"{name}.weight"])


def test_a_squeeze_of_the_whole_difference_is_its_best_approximation(tmp_path: Path) -> None:
    tuned, base = two_models()
    tuned = {key: t + torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) for key, t in tuned.items()}
    squeezed = extracted(tmp_path, tuned, base, max_rank=None).squeeze(rank=3)
    for name in LAYERS:
        dW = (tuned[f"{name}.weight"] - base[f"{name}.weight"]).double()
        best = torch.linalg.svdvals(dW)[3:].norm()
        assert float((dense(squeezed, name) - dW).norm()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("rank", [4, 2])
def test_the_energy_in_the_report_is_a_share_of_the_whole_difference(tmp_path: Path, rank: int) -> None:
    """At the bound too, which has cut something off already."""
    tuned, base = two_models()
    tuned = {key: t + torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) for key, t in tuned.items()}
    report = extracted(tmp_path, tuned, base, max_rank=4).squeeze(rank=rank).report
    for row in report.rows:
        S = torch.linalg.svdvals((tuned[f"{row.name}.weight"] - base[f"{row.name}.weight"]).double())
        assert row.energy == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), rel=1e-5)
        assert row.norm == pytest.approx(float(S.norm())) and row.discarded == pytest.approx(
            float(S[rank:].norm()), rel=1e-4
        )


def test_the_result_is_the_same_every_time_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    tuned, base = two_models()
    adapter = extracted(tmp_path, tuned, base)
    state = torch.get_rng_state()
    one, other = adapter.update("model.layers.0.q"), adapter.update("model.layers.0.q")
    assert torch.equal(one.B, other.B) and torch.equal(one.A, other.A)
    assert torch.equal(state, torch.get_rng_state())


def test_two_dtypes_are_subtracted_in_the_wider_one(tmp_path: Path) -> None:
    tuned, base = two_models()
    base = {key: (t / 3).to(torch.bfloat16) for key, t in base.items()}
    adapter = extracted(tmp_path, tuned, base, max_rank=None)
    name = "model.layers.0.q"
    assert torch.equal(adapter.update(name).dense(), tuned[f"{name}.weight"] - base[f"{name}.weight"].float())
    assert adapter.modules[name].dtype == torch.float32


def test_progress_ends_with_all_bytes_of_what_is_compared(tmp_path: Path) -> None:
    tuned, base = two_models()
    told: list[tuple[int, int]] = []
    extracted(tmp_path, tuned, base, exclude=r"layers\.1", progress=lambda done, total: told.append((done, total)))
    compared = sum(t.nbytes for key, t in base.items() if "layers.1" not in key)
    assert told[-1] == (compared, compared) and [done for done, _ in told] == sorted(done for done, _ in told)


# --- what differs ---------------------------------------------------------------------------------------------------


def test_layers_that_are_equal_are_no_modules(tmp_path: Path) -> None:
    tuned, base = two_models()
    tuned["model.layers.1.q.weight"] = base["model.layers.1.q.weight"]
    assert set(extracted(tmp_path, tuned, base).modules) == set(LAYERS) - {"model.layers.1.q"}


@pytest.mark.parametrize("narrow", ["tuned", "base"])
def test_a_cast_is_no_difference(tmp_path: Path, narrow: str) -> None:
    tuned, base = two_models()
    name = "model.layers.1.q.weight"
    whole = torch.randn(base[name].shape)
    tuned[name], base[name] = whole, whole
    (tuned if narrow == "tuned" else base)[name] = whole.to(torch.bfloat16)
    adapter = extracted(tmp_path, tuned, base)
    assert "model.layers.1.q" not in adapter.modules
    assert note_of(adapter, "but for rounding").startswith(f"{name}: ")


def test_a_difference_of_the_last_digits_of_float32_is_left_out(tmp_path: Path) -> None:
    tuned, base = two_models()
    name = "model.layers.1.q.weight"
    tuned[name] = base[name] * (1 + torch.finfo(torch.float32).eps / 4)
    tuned[name][0, 0] = base[name][0, 0] * (1 + 2 * torch.finfo(torch.float32).eps)
    assert not torch.equal(tuned[name], base[name])
    adapter = extracted(tmp_path, tuned, base)
    assert "model.layers.1.q" not in adapter.modules and note_of(adapter, "but for rounding").startswith(f"{name}: ")


def test_a_difference_of_single_steps_of_bfloat16_is_kept_and_marked(tmp_path: Path) -> None:
    tuned, base = two_models(torch.bfloat16)
    name = "model.layers.1.q.weight"
    W = base[name] = torch.randn(base[name].shape).to(torch.bfloat16)
    moved = torch.rand(W.shape) < 0.25
    tuned[name] = torch.where(moved, (W.view(torch.int16) + 1).view(torch.bfloat16), W)  # the next number
    adapter = extracted(tmp_path, tuned, base)
    assert "model.layers.1.q" in adapter.modules
    share = 100 * float(moved.double().mean())
    assert f"model.layers.1.q ({share:.2g} % of the numbers differ)" in note_of(adapter, "single rounding steps")


def test_nothing_that_differs_is_an_error(tmp_path: Path) -> None:
    _, base = two_models()
    with pytest.raises(LoraSqueezeError, match=r"nothing to extract: no layer that a LoRA could hold differs between"):
        extracted(tmp_path, base, base)


def test_norms_alone_that_differ_are_named_in_the_error(tmp_path: Path) -> None:
    _, base = two_models()
    with pytest.raises(
        LoraSqueezeError, match=r"nothing to extract.*model\.norm\.weight: changed and left as in the base"
    ):
        extracted(tmp_path, {**base, "model.norm.weight": base["model.norm.weight"] + 1}, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(tmp_path: Path, value: float) -> None:
    tuned, base = two_models()
    tuned["model.layers.0.q.weight"][3, 4] = value
    with pytest.raises(LoraSqueezeError, match=r"'model\.layers\.0\.q\.weight': NaN or infinity in "):
        extracted(tmp_path, tuned, base)


# --- names ----------------------------------------------------------------------------------------------------------

BODY = {"layers.0.q.weight": (24, 20), "layers.1.q.weight": (24, 20), "norm.weight": (20,)}


def body(prefix: str, plant: bool) -> Checkpoint:
    found = {}
    for i, (name, shape) in enumerate(BODY.items()):
        W = integers(*shape, seed=i)
        found[prefix + name] = W + planted(*shape, seed=50 + i) if plant and len(shape) == 2 else W
    return found


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ("model.", "model.", "model."),
        ("model.", "", "model."),
        ("", "transformer.", "transformer."),
        ("module.model.", "model.", "model."),
        ("_orig_mod.", "model.", "model."),
        ("module.", "module.", ""),
        ("model._orig_mod.", "model.", "model."),
        ("language_model.model.", "model.language_model.", "model.language_model."),
        ("model.language_model.", "language_model.model.", "language_model.model."),
        ("base_model.model.model.", "model.", "base_model.model.model."),
    ],
)
def test_one_change_of_prefix_is_found(tmp_path: Path, mine: str, theirs: str, expected: str) -> None:
    adapter = extracted(tmp_path, body(mine, True), body(theirs, False))
    assert set(adapter.modules) == {f"{expected}layers.{i}.q" for i in range(2)}
    for i in range(2):
        dW = body("", True)[f"layers.{i}.q.weight"] - body("", False)[f"layers.{i}.q.weight"]
        assert dense(adapter, f"{expected}layers.{i}.q").sub(dW).norm() < 1e-5 * dW.norm()


def test_a_head_beside_a_body_without_its_prefix(tmp_path: Path) -> None:
    """GPT-2 on the hub has the names of the body, what is tuned from it those of the model with the head."""
    tuned = body("transformer.", True) | {"lm_head.weight": integers(30, 20, seed=3)}
    adapter = extracted(tmp_path, tuned, body("", False))
    assert set(adapter.modules) == {f"transformer.layers.{i}.q" for i in range(2)}
    assert note_of(adapter, "only in the tuned model").startswith("lm_head.weight: ")
    assert "'transformer.' before names of the tuned model is '' in the base" in adapter.notes


def test_several_parts_of_a_model_may_change_their_prefixes(tmp_path: Path) -> None:
    """Models of text and images, as two releases of transformers name their parts."""
    head = {"lm_head.weight": integers(30, 20, seed=3)}
    vision = {f"layers.{i}.q.weight": integers(12, 20, seed=20 + i) for i in range(3)}
    tuned = {f"vision_tower.{key}": W + planted(*W.shape) for key, W in vision.items()}
    tuned |= body("language_model.model.", True) | {f"language_model.{key}": W for key, W in head.items()}
    base = {f"model.vision_tower.{key}": W for key, W in vision.items()} | body("model.language_model.", False) | head
    adapter = extracted(tmp_path, tuned, base)
    assert set(adapter.modules) == {f"model.language_model.layers.{i}.q" for i in range(2)} | {
        f"model.vision_tower.layers.{i}.q" for i in range(3)
    }
    assert not [note for note in adapter.notes if "only in" in note], adapter.notes


def test_a_name_that_one_model_has_alone_does_not_hide_the_change_of_the_others(tmp_path: Path) -> None:
    tuned = body("", True) | {"score.weight": integers(3, 20, seed=3), "layers.0.extra.weight": integers(3, 20, seed=3)}
    tuned["norm.weight"] = tuned["norm.weight"] + 1
    tuned = {f"module.{key}": W for key, W in tuned.items()}
    adapter = extracted(tmp_path, tuned, body("model.", False), carry=True)
    assert set(adapter.modules) == {f"model.layers.{i}.q" for i in range(2)}
    assert set(adapter.extras) == {"model.norm.weight", "score.weight", "layers.0.extra.weight"}


def test_one_name_at_the_top_does_not_hide_the_change_of_the_others(tmp_path: Path) -> None:
    tuned = body("", True) | {"score.weight": integers(3, 20, seed=3)}
    tuned["norm.weight"] = tuned["norm.weight"] + 1
    adapter = extracted(tmp_path, tuned, body("model.", False), carry=True)
    assert set(adapter.extras) == {"model.norm.weight", "score.weight"}


@pytest.mark.parametrize("others", [["b.norm"], ["b.norm", "c.norm"], ["b.a.norm", "c.a.norm"]], ids=", ".join)
def test_a_single_name_is_matched_only_where_that_is_clear(tmp_path: Path, others: list[str]) -> None:
    """It says too little about the files to refuse them, or to take one name for another."""
    tuned, base = two_models()
    tuned["a.norm.weight"] = integers(20, seed=4)
    base |= {f"{name}.weight": integers(20, seed=3) for name in others}
    assert note_of(extracted(tmp_path, tuned, base), "only in the tuned model").startswith("a.norm.weight: ")


def test_two_changes_of_prefix_that_would_do_are_refused(tmp_path: Path) -> None:
    base = body("student.", False) | body("teacher.", False)
    with pytest.raises(LoraSqueezeError, match=r"of the tuned model could be '(student|teacher)\..*rename the tensors"):
        extracted(tmp_path, body("", True), base)


def test_the_shapes_decide_where_the_names_do_not(tmp_path: Path) -> None:
    other = {f"teacher.{key}": W[: len(W) // 2] for key, W in body("", False).items()}
    adapter = extracted(tmp_path, body("", True), other | body("student.", False))
    assert set(adapter.modules) == {f"student.layers.{i}.q" for i in range(2)}


def test_no_names_in_common_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        LoraSqueezeError, match=r"no tensor names in common: the first is 'a\.w' .* and 'b\.v' in the base"
    ):
        extracted(tmp_path, {"a.w": torch.ones(2, 2)}, {"b.v": torch.ones(2, 2)})


def test_another_shape_is_refused_by_name_and_can_be_left_out(tmp_path: Path) -> None:
    tuned, base = two_models()
    tuned["model.layers.1.q.weight"] = torch.ones(24, 21)
    with pytest.raises(
        LoraSqueezeError, match=r"'model\.layers\.1\.q\.weight' has shape \[24, 21\] in .* and \[24, 20\] in"
    ):
        extracted(tmp_path, tuned, base)
    adapter = extract(tmp_path / "tuned", tmp_path / "base", exclude=r"layers\.1\.q$")
    assert set(adapter.modules) == set(LAYERS) - {"model.layers.1.q"}


def test_include_and_exclude_choose_layers_by_their_paths(tmp_path: Path) -> None:
    tuned, base = two_models()
    tuned["score.weight"] = base["old.weight"] = integers(3, 20, seed=3)
    adapter = extracted(tmp_path, tuned, base, include=r"\.q$", exclude=r"layers\.0")
    assert list(adapter.modules) == ["model.layers.1.q"] and adapter.notes == ()


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"include '\(' is no regular expression: "):
        extract(tmp_path, tmp_path, include="(")


def test_max_rank_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="max_rank must be at least 1, or None for whole matrices; got 0"):
        extract(tmp_path, tmp_path, max_rank=0)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    tuned, base = two_models()
    base["model.layers.0.q.weight"] = base["model.layers.0.q.weight"].to(torch.int8)
    with pytest.raises(
        LoraSqueezeError, match=r"'model\.layers\.0\.q\.weight' is stored as int8 in .*base \(quantised\)"
    ):
        extracted(tmp_path, tuned, base)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../tuned/model.safetensors"}}', "[" * 10**5, '{"weight_map": 3}']
)
def test_a_hostile_index_is_refused(tmp_path: Path, index: str) -> None:
    tuned, base = two_models()
    folder = write(tmp_path / "base", base)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(LoraSqueezeError, match=re.escape(INDEX)):
        extract(write(tmp_path / "tuned", tuned), folder)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_a_convolution_is_its_weight_as_a_matrix(tmp_path: Path) -> None:
    base = {"conv.weight": integers(12, 6, 3, 3, seed=1), "line.weight": integers(8, 6, 5, seed=2)}
    tuned = {key: W + planted(len(W), W[0].numel()).view(W.shape) for key, W in base.items()}
    adapter = extracted(tmp_path, tuned, base)
    for name, kernel in (("conv", (3, 3)), ("line", (5,))):
        module, dW = adapter.modules[name], (tuned[f"{name}.weight"] - base[f"{name}.weight"]).flatten(1)
        assert (module.kind, module.kernel, module.copies) == ("conv", kernel, 1)
        assert dense(adapter, name).sub(dW).norm() < 1e-5 * dW.norm()


def test_a_convolution_of_one_channel_each_is_left_with_a_note(tmp_path: Path) -> None:
    tuned, base = two_models()
    base["conv.weight"] = integers(12, 1, 4, seed=1)
    adapter = extracted(tmp_path, {**tuned, "conv.weight": base["conv.weight"] + 1}, base)
    assert "conv" not in adapter.modules
    assert note_of(adapter, "no LoRA holds it").startswith("conv.weight: ")


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts_are_one_matrix_each(tmp_path: Path, turned: bool) -> None:
    hidden, inner, path = 12, 10, "layers.0.mlp.experts"
    shapes = {"gate_up_proj": (3, 2 * inner, hidden), "down_proj": (3, hidden, inner)}
    base = {f"{path}.{name}": integers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    updates = {key: torch.stack([planted(*W.shape[1:], seed=i) for i in range(3)]) for key, W in base.items()}
    tuned = {key: W + updates[key] for key, W in base.items()}
    if turned:
        tuned, base = ({key: W.mT for key, W in side.items()} for side in (tuned, base))
    adapter = extracted(tmp_path, tuned, base, max_rank=2)
    for name, dW in updates.items():
        module = adapter.modules[name]
        assert (module.kind, module.copies, module.group) == ("experts", 3, f"parameters of {path}")
        assert (module.out_features, module.in_features) == tuple(dW.shape[1:])
        assert dense(adapter, name).sub(dW).norm() < 1e-5 * dW.norm()


def test_an_attention_layer_of_torch_is_left_with_a_note(tmp_path: Path) -> None:
    tuned, base = two_models()
    base |= {"attn.in_proj_weight": integers(60, 20, seed=1), "attn.out_proj.weight": integers(20, 20, seed=2)}
    tuned |= {key: W + 1 for key, W in base.items() if key.startswith("attn")}
    adapter = extracted(tmp_path, tuned, base)
    assert set(adapter.modules) == set(LAYERS)
    assert {"attn.in_proj_weight", "attn.out_proj.weight"} == set(
        note_of(adapter, "no LoRA").partition(":")[0].split(", ")
    )


# --- what no LoRA holds ---------------------------------------------------------------------------------------------


def with_vectors() -> tuple[Checkpoint, Checkpoint]:
    """Two models whose norm, with a bias, and whose bias of a layer differ too."""
    tuned, base = two_models()
    base |= {"model.norm.bias": integers(20, seed=5), "model.layers.0.q.bias": integers(24, seed=6)}
    tuned |= {"model.norm.bias": base["model.norm.bias"], "model.layers.0.q.bias": base["model.layers.0.q.bias"] + 1.5}
    tuned["model.norm.weight"] = base["model.norm.weight"] + 2
    return tuned, base


def test_norms_and_biases_are_left_and_named(tmp_path: Path) -> None:
    tuned, base = with_vectors()
    adapter = extracted(tmp_path, tuned, base)
    assert not adapter.extras
    names = note_of(adapter, "the option carry keeps such tensors whole").partition(":")[0]
    assert set(names.split(", ")) == {"model.norm.weight", "model.layers.0.q.bias"}


def test_carry_keeps_whole_layers_and_the_change_of_a_bias(tmp_path: Path) -> None:
    tuned, base = with_vectors()
    tuned |= {"score.weight": integers(3, 20, seed=8)}
    adapter = extracted(tmp_path, tuned, base, carry=True)
    kinds = {name: extra.kind for name, extra in adapter.extras.items()}
    whole = {"model.norm.weight", "model.norm.bias", "score.weight"}  # the bias too: a layer is replaced as a whole
    assert kinds == dict.fromkeys(whole, "module to save") | {"model.layers.0.q.bias": "lora bias"}
    for name in whole:
        assert torch.equal(adapter.extra(name), tuned[name])
    name = "model.layers.0.q.bias"
    assert torch.equal(adapter.extra(name), tuned[name] - base[name])
    assert adapter.extras[name].module == "model.layers.0.q" and adapter.modules["model.layers.0.q"].floor == 1


def test_a_parameter_of_its_own_cannot_be_carried(tmp_path: Path) -> None:
    tuned, base = two_models()
    base["model.layers.0.A_log"] = integers(20, seed=4)
    adapter = extracted(tmp_path, {**tuned, "model.layers.0.A_log": base["model.layers.0.A_log"] + 1}, base, carry=True)
    assert not adapter.extras
    assert note_of(adapter, "no adapter can carry it").startswith("model.layers.0.A_log: ")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.float8_e4m3fn, torch.bool], ids=str)
def test_buffers_of_any_dtype_are_compared(tmp_path: Path, dtype: torch.dtype) -> None:
    tuned, base = two_models()
    base |= {"ids": torch.zeros(6).to(dtype), "same": torch.ones(6).to(dtype), "empty": torch.ones(6, 0).to(dtype)}
    tuned |= {"ids": torch.ones(6).to(dtype), "same": base["same"], "empty": base["empty"]}
    adapter = extracted(tmp_path, tuned, base)
    assert note_of(adapter, "no LoRA holds it").startswith("ids: ")


def test_the_bias_of_a_longer_head_is_carried_over_the_rows_of_the_base(tmp_path: Path) -> None:
    tuned, base = two_models()
    base |= {"lm_head.weight": integers(40, 20, seed=1), "lm_head.bias": integers(40, seed=2)}
    longer = {"lm_head.weight": integers(48, 20, seed=4), "lm_head.bias": integers(48, seed=5)}
    adapter = extracted(tmp_path, tuned | longer, base, vocabulary="lora", carry=True)
    assert adapter.modules["lm_head"].out_features == 40
    assert torch.equal(adapter.extra("lm_head.bias"), longer["lm_head.bias"][:40] - base["lm_head.bias"])


def test_what_only_the_base_has_is_named(tmp_path: Path) -> None:
    tuned, base = two_models()
    adapter = extracted(tmp_path, tuned, {**base, "lm_head.weight": integers(30, 20, seed=1)})
    assert note_of(adapter, "only in the base").startswith("lm_head.weight: ")


# --- the vocabulary -------------------------------------------------------------------------------------------------


def test_a_changed_embedding_is_left_and_named(tmp_path: Path) -> None:
    tuned, base, _ = with_tokens()
    adapter = extracted(tmp_path, tuned, base)
    assert set(adapter.modules) == set(LAYERS) and not adapter.extras
    assert note_of(adapter, "the option vocabulary").startswith(f"{TOKENS}: changed and left as in the base")


@pytest.mark.parametrize(("rows_tuned", "rows_base"), [(40, 40), (48, 40), (40, 48)])
def test_the_common_rows_of_an_embedding_are_its_update(tmp_path: Path, rows_tuned: int, rows_base: int) -> None:
    tuned, base, dW = with_tokens(rows_tuned, rows_base)
    adapter = extracted(tmp_path, tuned, base, vocabulary="lora", max_rank=3)
    module = adapter.modules["model.embed_tokens"]
    assert (module.kind, module.out_features, module.in_features) == ("embedding", 20, rows_base)
    assert dense(adapter, "model.embed_tokens").sub(dW.mT).norm() < 1e-5 * dW.norm()
    told = [note for note in adapter.notes if "rows at the end that only the tuned model has" in note]
    assert [note.startswith("model.embed_tokens: 8 rows") for note in told] == [True] * (rows_tuned > rows_base)


def test_carry_keeps_the_whole_embedding_with_its_new_rows(tmp_path: Path) -> None:
    tuned, base, _ = with_tokens(48, 40)
    adapter = extracted(tmp_path, tuned, base, vocabulary="carry")
    assert set(adapter.modules) == set(LAYERS) and adapter.extras[TOKENS].kind == "module to save"
    assert torch.equal(adapter.extra(TOKENS), tuned[TOKENS])


def test_new_rows_alone_are_no_update(tmp_path: Path) -> None:
    tuned, base, _ = with_tokens(48, 40)
    tuned[TOKENS][:40] = base[TOKENS]
    adapter = extracted(tmp_path, tuned, base, vocabulary="lora")
    assert "model.embed_tokens" not in adapter.modules
    assert note_of(adapter, "only has new rows").startswith("model.embed_tokens: ")


def test_an_unknown_choice_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="vocabulary"):
        extract(tmp_path, tmp_path, vocabulary="keep")  # type: ignore[arg-type]


# --- it is neutral --------------------------------------------------------------------------------------------------


def test_it_is_written_in_no_format_of_its_own(tmp_path: Path) -> None:
    tuned, base = two_models()
    adapter = extracted(tmp_path, tuned, base)
    for act in (lambda: adapter.save(tmp_path / "out"), lambda: adapter.squeeze(size="1MB")):
        with pytest.raises(LoraSqueezeError, match=r"has no file format yet: convert it to one first"):
            act()
    assert not (tmp_path / "out").exists()
    assert adapter.format.home == (tmp_path / "tuned").resolve()
