"""Adapters that are broken or are no plain LoRA: how each is made, and what its refusal must say."""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_cases import CONFIG, PICKLE, PREFIX, WEIGHTS, plain_config, plain_tensors, write_folder

Q = f"{PREFIX}layers.0.q_proj"
A_KEY, B_KEY = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@dataclass(frozen=True)
class Case:
    """A builder of a folder, and what the message says: file or tensor, what was found, what to do."""

    build: Callable[[Path], object]
    fragments: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(*fragments: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def register(build: Callable[[Path], object]) -> Callable[[Path], object]:
        CASES[build.__name__.strip("_")] = Case(build, fragments)
        return build

    return register


def with_tensors(*fragments: str, config: dict[str, Any] | None = None) -> Callable[..., None]:
    """A case that changes the tensors of a plain adapter; the builder returns changes, None removes a tensor."""

    def register(change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
        def build(folder: Path) -> None:
            tensors = plain_tensors()
            changed = {**tensors, **change(tensors)}
            kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
            write_folder(folder, kept, plain_config(**(config or {})))

        CASES[change.__name__.strip("_")] = Case(build, fragments)

    return register


def with_config(name: str, changes: dict[str, Any], *fragments: str) -> None:
    """A case that changes the configuration of a plain adapter."""
    CASES[name] = Case(lambda folder: write_folder(folder, config=plain_config(**changes)), (CONFIG, *fragments))


def with_text(name: str, file: str, text: str | bytes | None, *fragments: str) -> None:
    """A case that has this text in place of a file; None: no such file."""

    def build(folder: Path) -> None:
        write_folder(folder)
        (folder / file).unlink()
        if text is not None:
            (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)

    CASES[name] = Case(build, fragments)


# --- the weights file -----------------------------------------------------------------------------------------------

with_text("no_weights", WEIGHTS, None, "no adapter_model.safetensors and no adapter_model.bin", "incomplete")
with_text("empty_file", WEIGHTS, b"", WEIGHTS, "empty", "download or export it again")
with_text(
    "git_lfs_pointer",
    WEIGHTS,
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    WEIGHTS,
    "git-lfs pointer",
    "git lfs pull",
)
with_text("html_page", WEIGHTS, "\n<!DOCTYPE html><html>404</html>", WEIGHTS, "web page", "download the file itself")
with_text("absurd_header", WEIGHTS, b"\xff" * 64, WEIGHTS, "header of 18446744073709551615 bytes", "not a safetensors")
with_text("header_of_lists", WEIGHTS, b"\x02\0\0\0\0\0\0\0[]", WEIGHTS, "begins with '['")


@case(WEIGHTS, "reach beyond", "damaged or incomplete: download or export it again")
def _truncated(folder: Path) -> None:
    path = write_folder(folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


@case(WEIGHTS, "'\\x1b'", "rename the tensor")
def _terminal_escape_in_a_name(folder: Path) -> None:
    write_folder(folder, plain_tensors() | {"\x1b[31mred": torch.ones(2)})


@case(WEIGHTS, "a pipe, not a regular file")
def _weights_are_a_link_to_a_pipe(folder: Path) -> None:
    path = write_folder(folder) / WEIGHTS
    path.unlink()
    os.mkfifo(folder / "pipe")
    path.symlink_to("pipe")


@case(WEIGHTS, "a folder, not a regular file")
def _weights_are_a_link_to_a_folder(folder: Path) -> None:
    path = write_folder(folder) / WEIGHTS
    path.unlink()
    path.symlink_to(".")


@case("no adapter_model.safetensors", "incomplete")
def _weights_are_a_dangling_link(folder: Path) -> None:
    path = write_folder(folder) / WEIGHTS
    path.unlink()
    path.symlink_to("nowhere")


# --- adapter_model.bin ----------------------------------------------------------------------------------------------


class RunsCode:
    """A pickle of this creates a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(folder: Path, content: object) -> None:
    write_folder(folder)
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLE)


@case(PICKLE, "holds more than tensors", "not opened, since it could run code", "save the adapter as safetensors")
def _pickle_that_runs_code(folder: Path) -> None:
    pickled(folder, {**plain_tensors(), "x": RunsCode(folder.parent / "code-was-run")})


@case(PICKLE, "expected a dictionary of tensors by name")
def _pickle_of_a_list(folder: Path) -> None:
    pickled(folder, list(plain_tensors().values()))


@case(PICKLE, "expected a dictionary of tensors by name")
def _pickle_with_a_number(folder: Path) -> None:
    pickled(folder, {**plain_tensors(), "step": 3})


@case(PICKLE, "not a readable PyTorch file")
def _pickle_that_is_cut_short(folder: Path) -> None:
    pickled(folder, plain_tensors())
    path = folder / PICKLE
    path.write_bytes(path.read_bytes()[:500])


@case(PICKLE, "could run code")
def _plain_pickle(folder: Path) -> None:
    pickled(folder, {})
    (folder / PICKLE).write_bytes(pickle.dumps({"a": RunsCode(folder.parent / "code-was-run")}, protocol=2))


@case(PICKLE, "git-lfs pointer", "git lfs pull")
def _bin_is_a_git_lfs_pointer(folder: Path) -> None:
    pickled(folder, {})
    (folder / PICKLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@case(PICKLE, "'\\x1b'", "rename the tensor")
def _terminal_escape_in_a_pickle(folder: Path) -> None:
    pickled(folder, {**plain_tensors(), "\x1b[31mred": torch.ones(2)})


@case(PICKLE, "a pipe")
def _bin_is_a_pipe(folder: Path) -> None:
    pickled(folder, {})
    (folder / PICKLE).unlink()
    os.mkfifo(folder / PICKLE)


# --- tensors --------------------------------------------------------------------------------------------------------


@with_tensors("layers.0.q_proj", "factor B holds NaN or infinity", "use an earlier checkpoint")
def _nan(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {B_KEY: tensors[B_KEY].clone().fill_(float("nan"))}


@with_tensors("layers.0.q_proj", "factor A holds NaN or infinity", "use an earlier checkpoint")
def _infinity(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY].clone().index_fill_(0, torch.tensor([1]), float("inf"))}


@with_tensors(A_KEY, "dtype torch.int32", "must be floating point")
def _integer_factors(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY].int()}


@with_tensors("orphan factor", A_KEY, "its partner", "get it again")
def _a_without_b(_: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {B_KEY: None}


@with_tensors("orphan factor", B_KEY, "its partner", "get it again")
def _b_without_a(_: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: None}


@with_tensors("layers.0.q_proj", "do not fit", "[7, 20]", "[24, 8]")
def _ranks_of_a_and_b_differ(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY][:7]}


@with_tensors(A_KEY, "shape [160]", "ZeRO-3", "save again from the gathered model")
def _flat_factor(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY].flatten()}


@with_tensors(A_KEY, "shape [0, 20]", "ZeRO-3", "save again from the gathered model")
def _empty_factor(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY][:0]}


@with_tensors("do not fit", "[8, 20, 3]", "[24, 8]")
def _convolution_with_a_flat_b(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY: tensors[A_KEY][..., None].expand(-1, -1, 3)}


@with_tensors("several adapters", "'default'", "'other'", "save each by itself")
def _two_adapters_in_one_file(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    renamed: dict[str, Any] = dict.fromkeys(tensors)
    for key, tensor in tensors.items():
        for name in ("default", "other"):
            renamed[key.replace(".weight", f".{name}.weight")] = tensor.clone()
    return renamed


@with_tensors("the same factor", A_KEY, f"{Q.removeprefix(PREFIX)}.lora_A.weight", "keep one")
def _one_factor_under_two_spellings(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {A_KEY.removeprefix(PREFIX): tensors[A_KEY].clone()}


@with_tensors("lora_magnitude_vector", "DoRA", "cannot be squeezed")
def _dora_without_its_flag(_: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {f"{Q}.lora_magnitude_vector": torch.ones(24)}


@with_tensors("lora_C", "no tensor that a plain LoRA has")
def _unknown_lora_tensor(_: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {f"{Q}.lora_C.weight": torch.ones(2, 2)}


@with_tensors("orphan bias", "layers.9.q_proj.lora_B.bias", "no LoRA module")
def _bias_without_factors(_: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {f"{PREFIX}layers.9.q_proj.lora_B.bias": torch.ones(2)}


def other_keys(name: str, *fragments: str, keys: tuple[str, ...]) -> None:
    CASES[name] = Case(lambda folder: write_folder(folder, {key: torch.ones(4, 4) for key in keys}), fragments)


other_keys(
    "kohya_keys",
    "no LoRA factors",
    "kohya or diffusers",
    "lora_A.weight",
    keys=("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"),
)
other_keys("diffusers_keys", "no LoRA factors", "kohya or diffusers", keys=("unet.q.lora.down.weight",))
other_keys("loha_keys", "LoHa", "hada_w1_a", keys=(f"{Q}.hada_w1_a", f"{Q}.hada_w1_b"))
other_keys("lokr_keys", "LoKr", "lokr_w1", keys=(f"{Q}.lokr_w1", f"{Q}.lokr_w2"))
other_keys("full_model", "no LoRA factors", "lora_A.weight", keys=("model.layers.0.q_proj.weight",))

# --- the configuration ----------------------------------------------------------------------------------------------

with_text("no_config", CONFIG, None, f"no {CONFIG}", "is this the folder of a PEFT adapter?")
with_text("config_is_not_json", CONFIG, "{'r': 8}", CONFIG, "not valid JSON", "restore the file")
with_text("config_is_latin_1", CONFIG, b'{"r": "\xe4"}', CONFIG, "not valid JSON")
with_text("config_is_a_list", CONFIG, "[1, 2]", CONFIG, "expected an object, found list")
with_text("config_is_deep", CONFIG, "[" * 100_000, CONFIG, "not valid JSON")
with_text("config_of_mlx", CONFIG, '{"fine_tune_type": "lora"}', CONFIG, "lora_parameters must be an object")
with_text("config_is_empty", CONFIG, "{}", CONFIG, "peft_type is None", "only LORA")
with_config("loha", {"peft_type": "LOHA"}, "peft_type is 'LOHA'", "convert ADAPTER")
with_config("rank_is_0", {"r": 0}, "r must be a whole number from 1, found 0")
with_config("rank_is_text", {"r": "8"}, "r must be a whole number from 1, found '8'")
with_config("rank_is_a_fraction", {"r": 8.5}, "r must be a whole number from 1, found 8.5")
with_config("alpha_is_nan", {"lora_alpha": float("nan")}, "lora_alpha must be a finite number, found nan")
with_config("alpha_is_infinite", {"lora_alpha": float("inf")}, "lora_alpha must be a finite number, found inf")
with_config("alpha_is_text", {"lora_alpha": "16"}, "lora_alpha must be a finite number, found '16'")
with_config("alpha_is_null", {"lora_alpha": None}, "lora_alpha must be a finite number, found None")
with_config("alpha_is_enormous", {"lora_alpha": 10**400}, "lora_alpha must be a finite number")
with_config("patterns_are_a_list", {"rank_pattern": [8]}, "rank_pattern must be an object", "found list")
with_config("pattern_is_no_regex", {"alpha_pattern": {"q(": 8}}, "alpha_pattern", "'q('", "not a regular expression")
with_config("pattern_value_is_text", {"rank_pattern": {"q": "8"}}, "rank_pattern['q'] must be a finite number")
with_config("pattern_of_rank_0", {"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be a whole number from 1, found 0")
with_config("saved_modules_are_a_number", {"modules_to_save": 3}, "modules_to_save must be a list of names")
with_config("dora", {"use_dora": True}, "DoRA (use_dora) cannot be squeezed", "Way out")
with_config("pissa", {"init_lora_weights": "pissa_niter_16"}, "PiSSA", "Way out")
with_config("unknown_init", {"init_lora_weights": "spooky"}, "init_lora_weights 'spooky' is not known")
with_config("unknown_variant", {"use_spooky": True}, "unknown field 'use_spooky'", "remove it")


@case(A_KEY, "8 rows", "not a multiple of the rank 3", "cannot be told apart")
def _experts_with_a_rank_that_does_not_divide(folder: Path) -> None:
    write_folder(folder, config=plain_config(r=3, target_modules=[], target_parameters=["q_proj.weight"]))


@case(CONFIG, "a folder, not a regular file")
def _config_is_a_folder(folder: Path) -> None:
    write_folder(folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


@case(CONFIG, "a pipe")
def _config_is_a_pipe(folder: Path) -> None:
    write_folder(folder)
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
