"""Names of kohya files: every layer of the real models has one, and dW under diffusers' names is what was meant."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import dense
from kohya_cases import write_kohya
from kohya_names_cases import (
    SD_BLOCKS,
    clip,
    flux,
    kohya_file,
    layers,
    load,
    loaded_by_diffusers,
    models,
    sd3,
    sd_pipeline,
    sd_unet,
    t5,
    without_text_model,
    xl_unet,
)
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya
from lora_squeeze.formats.kohya_maps import ARCHITECTURES, dit
from lora_squeeze.formats.kohya_maps.layer import Layer
from lora_squeeze.formats.kohya_names import neutral, part_rows

# What each component is in the released models.
REAL: dict[str, list[Callable[[], nn.Module]]] = {
    "sd1.unet": [sd_unet],
    "sd1.text_encoder": [lambda: clip(12)],
    "sd2.unet": [sd_unet],
    "sd2.text_encoder": [lambda: clip(23)],
    "sdxl.unet": [xl_unet],
    "sdxl.text_encoder": [lambda: clip(12)],
    "sdxl.text_encoder_2": [lambda: clip(32, projection=True)],
    "sd3.transformer": [lambda: sd3(24), lambda: sd3(24, 13), lambda: sd3(38)],
    "sd3.text_encoder": [lambda: clip(12, projection=True)],
    "sd3.text_encoder_2": [lambda: clip(32, projection=True)],
    "sd3.text_encoder_3": [lambda: t5(24)],
    "flux.transformer": [flux],
    "flux.text_encoder": [lambda: clip(12)],
    "flux.text_encoder_2": [lambda: t5(24)],
}
WIDTH = 4  # of the small layers that are taken apart
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_3_linear1"
HERE = "transformer.transformer_blocks.0.attn"
THERE = "transformer.single_transformer_blocks.3"


def written(architecture: str, component: str) -> dict[str, Layer]:
    found = next(each for each in ARCHITECTURES[architecture].components if each.name == component)
    return {found.written(layer): layer for layer in found.layers}


def pair(name: str, B: Tensor, A: Tensor, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("place", REAL)
def test_every_layer_of_the_real_models_has_exactly_one_name(place: str) -> None:
    with torch.device("meta"):
        real = set().union(*(layers(make()) for make in REAL[place]))
    names = written(*place.split("."))
    targets = [target for layer in names.values() for target in layer.targets]
    spelled = set(targets) | {target.removeprefix("text_model.") for target in targets}
    last = {path for path in targets if path.startswith("transformer_blocks.37.")}  # one side ends earlier there
    assert len(targets) == len(set(targets))
    assert real <= spelled
    assert {t for t in targets if t not in real and t.removeprefix("text_model.") not in real} <= last


def test_every_component_is_compared_with_a_real_model() -> None:
    assert set(REAL) == {f"{a.name}.{c.name}" for a in ARCHITECTURES.values() for c in a.components}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda each: each.name)
def test_what_is_written_is_read_as_the_same_layer(architecture) -> None:  # type: ignore[no-untyped-def]
    places, shares = architecture.places(), architecture.shares()
    names = [each.written(layer) for each in architecture.components for layer in each.layers]
    assert len(names) == len(set(names))
    for name in names:
        for index, target in enumerate(places[name].targets):
            assert (shares[target].name, shares[target].index) == (name, index)


def test_no_name_is_of_two_architectures_with_different_layers_but_for_t5() -> None:
    tables = [each.places() for each in ARCHITECTURES.values()]
    for i, one in enumerate(tables):
        for other in tables[:i]:
            different = {name for name in one.keys() & other.keys() if one[name] != other[name]}
            assert all(
                name.startswith(("lora_te3_encoder_block_", "text_encoders.t5xxl.transformer.")) for name in different
            )


def columns_of(names: dict[str, Layer], rows: Callable[[Layer], int], width: int) -> dict[str, Tensor]:
    """Tensors of a kohya file in which no two rows of all B are equal, so that their order shows."""
    tensors: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(names.items()):
        B = (torch.arange(rows(layer), dtype=torch.float64) + 1 + 1e6 * i)[:, None]
        tensors |= pair(name, B, torch.full((1, width), 1.0, dtype=torch.float64))
    return tensors


def same_as_base_weights(
    tmp_path: Path,
    names: dict[str, Layer],
    rows: Callable[[Layer], int],
    width: int,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    prefix: str = "",
) -> None:
    """The updates get the places of the rows that a conversion of a checkpoint gives those of the base weights."""
    tensors = columns_of(names, rows, width)
    adapter = neutral(load(tmp_path / "file.safetensors", tensors))
    checkpoint = {}
    for name, layer in names.items():
        B = tensors[f"{name}.lora_up.weight"]
        checkpoint |= {f"{prefix}{layer.name}.weight": B, f"{prefix}{layer.name}.bias": B[:, 0]}
    base = convert(checkpoint)
    assert adapter.modules
    for name in adapter.modules:
        update = adapter.update(name)
        assert torch.equal(update.B, base[name.partition(".")[2] + ".weight"]) and torch.all(update.A == 1)
    whole = {key for key in base if key.endswith(".weight") and base[key].dim() == 2}
    assert {name.partition(".")[2] + ".weight" for name in adapter.modules} == whole


def test_rows_of_flux_are_those_of_a_converted_checkpoint(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width, blocks = 3072, (1, 2)  # the conversion has this width only
    few = dit.flux(*blocks)
    names = {name: layer for name, layer in written("flux", "transformer").items() if layer in few}
    norms = [
        f"double_blocks.0.{side}_attn.norm.{each}_norm.scale" for side in ("img", "txt") for each in ("query", "key")
    ]
    norms += [f"single_blocks.{i}.norm.{each}_norm.scale" for i in range(blocks[1]) for each in ("query", "key")]

    def rows(layer: Layer) -> int:
        return sum(layer.parts) * width if layer.parts else 6

    def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_flux_transformer_checkpoint_to_diffusers(checkpoint | dict.fromkeys(norms, torch.ones(1)))

    assert len(names) == len(few)
    same_as_base_weights(tmp_path, names, rows, width, convert)


@pytest.mark.parametrize(("blocks", "dual"), [(24, 0), (24, 13), (38, 0)])
def test_rows_of_sd3_are_those_of_a_converted_checkpoint(tmp_path: Path, blocks: int, dual: int) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    last = f"joint_blocks.{blocks - 1}.context_block."
    few = dit.sd3(blocks, dual)

    def there(layer: Layer) -> bool:
        return layer in few and (not layer.name.startswith(last) or layer.name.endswith(("qkv", "adaLN_modulation.1")))

    def rows(layer: Layer) -> int:
        if "adaLN" not in layer.name:
            return 3 * WIDTH if layer.parts else WIDTH
        return (2 if layer.name.startswith((last, "final_layer")) else 6) * WIDTH

    def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_sd3_transformer_checkpoint_to_diffusers(checkpoint | {"pos_embed": torch.ones(1, 1, WIDTH)})

    names = {name: layer for name, layer in written("sd3", "transformer").items() if there(layer)}
    same_as_base_weights(tmp_path, names, rows, WIDTH, convert)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_original_names_of_a_unet_are_those_of_a_converted_checkpoint(tmp_path: Path, architecture: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {"layers_per_block": 2} | ({"addition_embed_type": "text_time"} if architecture == "sdxl" else {})
    names = {f"lora_unet_{x.name.replace('.', '_')}": x for x in written(architecture, "unet").values()}
    prefix = "model.diffusion_model."
    same_as_base_weights(
        tmp_path, names, lambda _: WIDTH, 9 * WIDTH, lambda c: convert_ldm_unet_checkpoint(c, config), prefix
    )


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_blocks_of_the_original_unet_are_counted_without_gaps(architecture: str) -> None:
    """They are lists of lists of layers; the conversion of checkpoints takes the upsampler at two places."""
    members: dict[tuple[str, str], set[str]] = {}
    for layer in written(architecture, "unet").values():
        side, block, member, *_ = (*layer.name.split("."), "")
        if side in ("input_blocks", "output_blocks"):
            members.setdefault((side, block), set()).add(member)
    for side in ("input_blocks", "output_blocks"):
        blocks = [block for here, block in members if here == side]
        assert blocks == [str(i) for i in range(len(blocks))]
    assert all(found == {str(i) for i in range(len(found))} for found in members.values())


def test_a_pipeline_makes_the_same_updates_of_the_file(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    shapes = {}
    for component, model in models(pipeline).items():
        for path, shape in layers(model).items():
            prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
            shapes[prefix + path.replace(".", "_")] = shape
    path = kohya_file(tmp_path / "file.safetensors", shapes, ranks=(2, 3))
    adapter, theirs = neutral(load(path)), loaded_by_diffusers(pipeline, path)
    assert {without_text_model(name) for name in adapter.modules} == set(theirs) and len(shapes) == len(theirs)
    for name in adapter.modules:
        torch.testing.assert_close(dense(adapter, name).float(), theirs[without_text_model(name)], rtol=1e-5, atol=1e-5)


def sparse(
    parts: int, sizes: list[int], rank: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What sd-scripts saves of a layer that it trained in parts: A stacked, B zero outside of the blocks."""
    B = torch.block_diag(*(torch.randn(rows, rank) for rows in sizes))
    return B.to(dtype), torch.randn(parts * rank, width).to(dtype)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_parts_of_flux_are_those_of_diffusers(tmp_path: Path, kind: str) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    width, rank, tensors = 3072, 2, {}
    for name, sizes in ((QKV, [width] * 3), (LINEAR1, [width] * 3 + [4 * width])):
        B, A = sparse(len(sizes), sizes, rank, width)
        tensors |= pair(name, torch.randn(B.shape) if kind == "dense" else B, A, alpha=3.0)
    adapter = neutral(load(tmp_path / "file.safetensors", tensors))
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert {f"{name}.lora_A.weight" for name in adapter.modules} == {key for key in theirs if "lora_A" in key}
    probe = torch.randn(width, 3, dtype=torch.float64)
    for name, module in adapter.modules.items():
        update = adapter.update(name)
        B, A = (theirs[f"{name}.lora_{side}.weight"].double() for side in "BA")
        assert module.rank == update.rank == len(A)
        torch.testing.assert_close(
            update.scale * (update.B.double() @ (update.A.double() @ probe)), B @ (A @ probe), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_parts_of_a_dense_layer_share_a_and_have_their_rows_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    B, A = (torch.rand(7 * WIDTH, 5) + 1).to(dtype), torch.randn(5, WIDTH).to(dtype)
    adapter = neutral(load(tmp_path / "file.safetensors", pair(LINEAR1, B, A, alpha=2.5)))
    assert list(adapter.modules) == [f"{THERE}.{last}" for last in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    start = 0
    for name, module in adapter.modules.items():
        update = adapter.update(name)
        stop = start + (4 * WIDTH if "mlp" in name else WIDTH)
        assert (module.rank, module.scale, module.dtype, module.out_features) == (5, 0.5, dtype, stop - start)
        assert torch.equal(update.A.float(), A.float()) and torch.equal(update.B.float(), B[start:stop].float())
        start = stop


def test_parts_that_were_trained_apart_get_their_own_rank_back(tmp_path: Path) -> None:
    B, A = sparse(3, [WIDTH] * 3, 2, WIDTH)
    adapter = neutral(load(tmp_path / "file.safetensors", pair(QKV, B, A, alpha=3.0)))
    assert [module.rank for module in adapter.modules.values()] == [2, 2, 2]
    for i, name in enumerate(adapter.modules):
        whole = (3.0 / 6) * (B.double() @ A.double())
        assert torch.equal(dense(adapter, name), whole[i * WIDTH : (i + 1) * WIDTH])


@pytest.mark.parametrize("split", [True, False])
def test_a_note_tells_of_a_training_in_parts(tmp_path: Path, split: bool) -> None:
    B, A = sparse(3, [WIDTH] * 3, 2, WIDTH)
    strings = {"ss_network_args": json.dumps({"split_qkv": str(split)})}
    notes = neutral(kohya.load(write_kohya(tmp_path / "file.safetensors", pair(QKV, B, A), strings))).notes
    assert any("1 layers are several in diffusers" in note for note in notes)
    assert any("a third (linear1: a quarter) of it" in note for note in notes) == split


def test_a_part_that_is_zero_is_left_out_unless_all_are(tmp_path: Path) -> None:
    B, A = torch.ones(3 * WIDTH, 2), torch.randn(2, WIDTH)
    B[WIDTH : 2 * WIDTH] = 0
    some = neutral(load(tmp_path / "some.safetensors", pair(QKV, B, A)))
    assert list(some.modules) == [f"{HERE}.to_q", f"{HERE}.to_v"]
    none = neutral(load(tmp_path / "none.safetensors", pair(QKV, torch.zeros_like(B), A)))
    assert [(module.rank, float(dense(none, name).norm())) for name, module in none.modules.items()] == [(2, 0.0)] * 3


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("lycoris_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("diffusion_model.input_blocks.4.1.proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("unet.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("diffusion_model.single_blocks.7.linear2", "transformer.single_transformer_blocks.7.proj_out"),
        ("lora_transformer_single_transformer_blocks_7_attn_to_q", "transformer.single_transformer_blocks.7.attn.to_q"),
        ("lora_unet_joint_blocks_2_x_block_attn2_proj", "transformer.transformer_blocks.2.attn2.to_out.0"),
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", "text_encoder.text_model.encoder.layers.1.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", "text_encoder.text_model.encoder.layers.1.mlp.fc1"),
        ("text_encoder.encoder.layers.1.mlp.fc1", "text_encoder.text_model.encoder.layers.1.mlp.fc1"),
        ("text_encoders.clip_g.transformer.text_projection", "text_encoder_2.text_projection"),
        ("lora_te2_encoder_block_3_layer_0_SelfAttention_o", "text_encoder_2.encoder.block.3.layer.0.SelfAttention.o"),
    ],
)
def test_names_of_comfyui_onetrainer_and_diffusers_are_known(tmp_path: Path, name: str, target: str) -> None:
    adapter = neutral(kohya.load(kohya_file(tmp_path / "file.safetensors", {name: (WIDTH, WIDTH)})))
    assert list(adapter.modules) == [target] and adapter.modules[target].name == target
    again = neutral(adapter)
    assert list(again.modules) == [target] and torch.equal(dense(again, target), dense(adapter, target))


def test_an_unknown_name_is_told_with_the_architectures_that_were_tried(tmp_path: Path) -> None:
    known, unknown = "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_down_blocks_0_motion_modules_0_proj_in"
    adapter = load(kohya_file(tmp_path / "file.safetensors", {known: (4, 4), unknown: (4, 4)}))
    with pytest.raises(LoraSqueezeError, match=f"'{unknown}' is no layer of sd1 or sd2 or sdxl or sd3 or flux"):
        neutral(adapter)
    with pytest.raises(LoraSqueezeError, match=f"'{known}' is no layer of flux \\(2 of 2 names are not of flux"):
        neutral(adapter, "flux")
    with pytest.raises(LoraSqueezeError, match="unknown architecture 'sdx': choose one of sd1, sd2, sdxl, sd3, flux"):
        neutral(adapter, "sdx")


def test_a_name_with_two_meanings_is_decided_by_the_architecture(tmp_path: Path) -> None:
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    adapter = load(kohya_file(tmp_path / "file.safetensors", {name: (4, 4)}))
    with pytest.raises(
        LoraSqueezeError, match=r"is a layer of sd3 and of flux, with another meaning; .*--architecture"
    ):
        neutral(adapter)
    found = [next(iter(neutral(adapter, which).modules)).partition(".")[0] for which in ("sd3", "flux")]
    assert found == ["text_encoder_3", "text_encoder_2"]


def test_two_names_of_one_layer_are_refused(tmp_path: Path) -> None:
    names = ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in")
    adapter = load(kohya_file(tmp_path / "file.safetensors", dict.fromkeys(names, (4, 4))))
    with pytest.raises(
        LoraSqueezeError, match=r"are both the layer unet.down_blocks.1.attentions.0.proj_in; .*remove one"
    ):
        neutral(adapter)


def test_a_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapter = load(kohya_file(tmp_path / "qkv.safetensors", {QKV: (3 * WIDTH + 3, WIDTH)}))
    with pytest.raises(LoraSqueezeError, match="is 15 x 4, and a layer of 3 parts has 12 rows: is it of another"):
        neutral(adapter)
    odd = load(kohya_file(tmp_path / "last.safetensors", {"lora_unet_final_layer_adaLN_modulation_1": (7, WIDTH)}))
    with pytest.raises(LoraSqueezeError, match="has 7 rows, where a shift and a scale of one size are expected"):
        neutral(odd)


def test_a_convolution_and_a_text_encoder_keep_what_is_known_of_them(tmp_path: Path) -> None:
    names = {"lora_unet_conv_in": (8, 4, 3, 3), "lora_te_text_model_encoder_layers_0_mlp_fc2": (8, 16)}
    before = load(kohya_file(tmp_path / "file.safetensors", names, alphas=(3.0, 5.0)))
    after = neutral(before)
    targets = ["unet.conv_in", "text_encoder.text_model.encoder.layers.0.mlp.fc2"]
    for name, target in zip(names, targets, strict=True):
        old, new = before.modules[name], after.modules[target]
        assert (new.kind, new.kernel, new.scale, new.rank) == (old.kind, old.kernel, old.scale, old.rank)
        assert torch.equal(dense(after, target), dense(before, name))
    assert after.source.digest() == before.source.digest()


@pytest.mark.parametrize("place", ["sd1.unet", "sd2.unet", "sdxl.unet", "sd3.transformer"])
def test_the_kernels_are_those_of_the_real_layers(place: str) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sd2 = UNet2DConditionModel(block_out_channels=(4, 8, 16, 16), use_linear_projection=True, **SD_BLOCKS)
        real = [layers(sd2) if place == "sd2.unet" else layers(make()) for make in REAL[place][:2]]
    shapes = {path: shape for each in real for path, shape in each.items()}
    known = {target: layer.kernel for layer in written(*place.split(".")).values() for target in layer.targets}
    assert {path: known[path] for path in shapes} == {path: shape[2:] for path, shape in shapes.items()}


def flat(name: str, out: int, columns: int, form: str = "LoHa") -> dict[str, Tensor]:
    """An update that does not show whether it is one of a convolution."""
    if form == "plain":
        return pair(name, torch.randn(out, 2), torch.randn(2, columns))
    if form == "LoKr":
        parts = {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 2), "lokr_w2_b": (2, columns // 2)}
    else:
        parts = {f"hada_w{i}_{side}": (out, 2) if side == "a" else (2, columns) for i in (1, 2) for side in "ab"}
    return {f"{name}.{role}": torch.randn(shape) for role, shape in parts.items()}


@pytest.mark.parametrize("form", ["LoHa", "LoKr", "plain"])
def test_a_kernel_that_the_file_does_not_show_is_that_of_the_layer(tmp_path: Path, form: str) -> None:
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    from lora_squeeze.conversion import convert

    shapes = {
        f"down_blocks.1.{path}": shape
        for path, shape in {
            "resnets.0.conv1": (8, 4 * 9),
            "resnets.0.conv_shortcut": (8, 4),
            "downsamplers.0.conv": (8, 8 * 9),
            "attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        }.items()
    }
    tensors: dict[str, Tensor] = {}
    for path, shape in shapes.items():
        tensors |= flat(f"lora_unet_{path.replace('.', '_')}", *shape, form=form)
    before = load(tmp_path / "file.safetensors", tensors)
    convert(before, "peft", component="unet").save(tmp_path / "peft")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(4, 8, 16, 16), **SD_BLOCKS)
    model = PeftModel.from_pretrained(unet, str(tmp_path / "peft"))
    for path in shapes:
        dW = model.base_model.model.get_submodule(path).get_delta_weight("default").detach().flatten(1)
        torch.testing.assert_close(
            dW.double(), dense(before, f"lora_unet_{path.replace('.', '_')}"), rtol=1e-4, atol=1e-4
        )


def test_a_layer_that_is_a_convolution_in_one_architecture_needs_it_told_where_the_file_does_not_show_it(
    tmp_path: Path,
) -> None:
    name, target = "lora_unet_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"
    adapter = load(tmp_path / "loha.safetensors", flat(name, 8, 8))
    with pytest.raises(
        LoraSqueezeError, match=f"'{name}' is a convolution in sd1 and a linear layer in sd2, .*--architecture"
    ):
        neutral(adapter)
    found = [neutral(adapter, which).modules[target] for which in ("sd1", "sd2", "sdxl")]
    assert [(module.kind, module.kernel) for module in found] == [("conv", (1, 1)), ("linear", ()), ("linear", ())]
    assert neutral(load(tmp_path / "plain.safetensors", flat(name, 8, 8, "plain"))).modules[target].kernel == ()


def test_a_width_that_no_kernel_divides_is_refused(tmp_path: Path) -> None:
    adapter = load(tmp_path / "file.safetensors", flat("lora_unet_down_blocks_1_resnets_0_conv1", 8, 35))
    with pytest.raises(LoraSqueezeError, match="has 35 columns, which are no multiple of the kernel 3 x 3"):
        neutral(adapter)


def test_only_layers_that_are_taken_apart_are_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {QKV: (3 * WIDTH, WIDTH), "lora_unet_double_blocks_0_img_attn_proj": (WIDTH, WIDTH)}
    adapter = load(kohya_file(tmp_path / "file.safetensors", names))
    read: list[str] = []
    original = kohya.TensorFile.read
    monkeypatch.setattr(kohya.TensorFile, "read", lambda self, name: (read.append(name), original(self, name))[1])
    after = neutral(adapter)
    assert sorted(read) == [f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight"]
    read.clear()
    after.source.updates(list(after.modules.values()))
    assert len(read) == len(set(read)) == 4


def test_neutral_names_are_not_written_as_a_kohya_file(tmp_path: Path) -> None:
    adapter = neutral(load(kohya_file(tmp_path / "file.safetensors", {QKV: (3 * WIDTH, WIDTH)})))
    with pytest.raises(
        LoraSqueezeError, match=r"names of diffusers, under which no reader .* convert it to a format first"
    ):
        adapter.save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_rows_of_parts_follow_each_other() -> None:
    layer = next(each for each in dit.flux(1, 1) if each.name == "single_blocks.0.linear1")
    assert part_rows(layer, 2) == [(0, 2), (2, 4), (4, 6), (6, 14)]
