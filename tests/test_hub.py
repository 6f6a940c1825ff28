"""Finding an adapter: on disk first, else on the hub, which is asked for no file that does not belong to one."""

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from adapter_cases import CONFIG, RANK, WEIGHTS, plain_config, write_folder
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError

FOREIGN = [
    "modeling_evil.py", "pytorch_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "optimizer.pt",
    "training_args.bin", "other/adapter_model.safetensors", "checkpoint-5/adapter_config.json", "README.md.exe",
]  # fmt: skip


class Hub:
    """Stands in for the download: a folder of files, of which those that match the patterns are copied."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"]):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def got(self) -> set[str]:
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with an adapter, one in a subfolder, and files that are none of our business."""
    remote = write_folder(tmp_path / "remote")
    write_folder(remote / "inner", config=plain_config(lora_alpha=4))
    for name in [*FOREIGN, "README.md", "tokenizer.json", "inner/chat_template.jinja"]:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("text")
    hub = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_only_files_of_the_adapter_are_asked_for(hub: Hub) -> None:
    assert lora_squeeze.load("user/adapter").rank == RANK
    assert hub.got() == {CONFIG, WEIGHTS, "README.md", "tokenizer.json"}
    assert not any("*" in pattern for pattern in hub.calls[0]["allow_patterns"])


@pytest.mark.parametrize("spelling", ["inner", "inner/"])
def test_a_subfolder_is_taken_alone(hub: Hub, spelling: str) -> None:
    assert lora_squeeze.load("user/adapter", subfolder=spelling).default_scale == 4 / RANK
    assert hub.got() == {f"inner/{name}" for name in (CONFIG, WEIGHTS, "chat_template.jinja")}
    assert lora_squeeze.load(hub.folder, subfolder=spelling).default_scale == 4 / RANK


def test_the_request_is_passed_on(hub: Hub, tmp_path: Path) -> None:
    lora_squeeze.load("user/adapter", revision="v2", token="secret", cache_dir=str(tmp_path / "c"))
    call = hub.calls[0]
    assert (call["repo_id"], call["revision"], call["token"]) == ("user/adapter", "v2", "secret")
    assert call["cache_dir"] == tmp_path / "c"


@pytest.mark.parametrize("name", ["user/adapter", "adapter"])
def test_what_is_on_disk_is_never_looked_up(hub: Hub, tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / name)
    assert lora_squeeze.load(name).rank == RANK
    (tmp_path / name / CONFIG).unlink()
    with pytest.raises(LoraSqueezeError, match=f"no {CONFIG}"):
        lora_squeeze.load(name)
    assert hub.calls == []


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_of_the_adapter_stands_for_its_folder(hub: Hub, name: str) -> None:
    assert lora_squeeze.load(hub.folder / name).rank == RANK


def test_the_home_folder_may_be_written_as_a_tilde(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lora_squeeze.load("~/remote").rank == RANK and hub.calls == []


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/adapter", "a/b/c", "../up", "user/../adapter", "user adapter", "-x/y", "a/b\n", ""]
)
def test_what_cannot_be_a_hub_id_is_a_missing_folder(hub: Hub, name: str) -> None:
    with pytest.raises(
        LoraSqueezeError, match=r"no such folder, and not the form of a hub id \(user/name\)|no adapter_con"
    ):
        lora_squeeze.load(name)
    assert hub.calls == []


def test_other_files_and_folders_are_refused_with_what_is_expected(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_text("x")
    for name, text in [
        ("notes.txt", "expected the folder of a PEFT adapter, with"),
        ("whole.safetensors", "expected .* keys of diffusers, kohya or LyCORIS; found 'model.layers.0.weight'"),
        ("cut.safetensors", "the file has 1 bytes, too short for safetensors"),
    ]:
        with pytest.raises(LoraSqueezeError, match=text):
            lora_squeeze.load(tmp_path / name)
    with pytest.raises(LoraSqueezeError, match=f"no {CONFIG} here, but in its folders .*remote.*name one"):
        lora_squeeze.load(tmp_path)
    with pytest.raises(LoraSqueezeError, match=f"no {CONFIG}; is this the folder of a PEFT adapter"):
        lora_squeeze.load(hub.folder, subfolder="nowhere")


@pytest.mark.parametrize("name", ["style.safetensors", "pytorch_lora_weights.safetensors", "a/b.safetensors"])
def test_a_file_of_kohya_is_found_by_its_name_its_folder_and_on_the_hub(hub: Hub, tmp_path: Path, name: str) -> None:
    pair = {"lora_unet_to_q.lora_down.weight": torch.eye(2, 6), "lora_unet_to_q.lora_up.weight": torch.eye(4, 2)}
    (tmp_path / "there" / name).parent.mkdir(parents=True)
    save_file(pair, tmp_path / "there" / name)
    hub.folder = tmp_path / "there"
    for place in (hub.folder / name, (hub.folder / name).parent, f"user/repo/{name}"):
        assert lora_squeeze.load(place).modules["lora_unet_to_q"].in_features == 6
    assert hub.got() == {name}
    with pytest.raises(LoraSqueezeError, match=r"user/repo: the repository has no file 'none\.gguf'"):
        lora_squeeze.load("user/repo/none.gguf")


def test_one_of_several_files_must_be_named(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.gguf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(LoraSqueezeError, match=r"one\.safetensors, two\.gguf; name the file that is meant"):
        lora_squeeze.load(tmp_path)


def not_found(*_: Any, **__: Any) -> None:
    response: Any = SimpleNamespace(headers={}, request=None)
    raise RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found.\nPlease log in", response=response)


def offline(*_: Any, **__: Any) -> None:
    raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nTo enable look-ups, go online")


def silent(*_: Any, **__: Any) -> None:
    raise OSError


@pytest.mark.parametrize(
    ("fails", "text"),
    [(not_found, "404 Client Error."), (offline, "Cannot find an appropriate cached snapshot"), (silent, "OSError")],
)
def test_an_error_of_the_hub_becomes_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None], text: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(LoraSqueezeError) as error:
        lora_squeeze.load("user/adapter")
    assert str(error.value).startswith("user/adapter: no such folder here, and the hub did not give it (")
    assert text in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_the_real_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set for the whole suite: nothing is asked, and the message is ours."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        LoraSqueezeError, match=r"no-such-user/no-such-adapter: no such folder here, and the hub did not"
    ):
        lora_squeeze.load("no-such-user/no-such-adapter", cache_dir=tmp_path / "cache")
