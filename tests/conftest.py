"""Settings for all tests: one thread, no network, quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from peft_models import Menagerie

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """Every test starts from the same global random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def menagerie(tmp_path_factory: pytest.TempPathFactory) -> "Menagerie":
    """Real PEFT adapters of all kinds. Imported here, since PEFT takes seconds that other tests need not wait for."""
    from peft_cases import CASES
    from peft_models import Menagerie

    return Menagerie(CASES, tmp_path_factory.mktemp("menagerie"))
