"""The catalogue of methods is one source: for PEFT, the command line, README and docs."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_cases import command

from lora_squeeze.formats.peft_methods import row_of
from lora_squeeze.methods.catalogue import BEGIN, CATALOGUE, END, Entry, as_markdown, becomes, write_into
from lora_squeeze.training.sft_settings import TrainSettings

ROOT = Path(__file__).parents[1]
NAMES = [entry.name for entry in CATALOGUE]


def test_names_are_unique_and_all_methods_have_their_fields() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for entry in CATALOGUE:
        assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper), entry.name
        assert entry.family in ("adapters", "ranks"), entry.name
        assert entry.route in ("exact", "squeezed"), entry.name
        assert bool(entry.rank) == (entry.route == "exact"), entry.name
        page, _, section = entry.record.partition("#")
        assert f"\n## {section}\n" in (ROOT / page).read_text(encoding="utf-8"), entry.name


@pytest.mark.parametrize("entry", CATALOGUE, ids=NAMES)
def test_every_module_documents_its_paper_and_has_its_configuration(entry: Entry) -> None:
    module = importlib.import_module(entry.module)
    assert entry.paper in (module.__doc__ or "")
    if entry.config:
        config = getattr(module, entry.config)
        assert config.method == entry.name
        assert "Args:" in config.__doc__


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.config], ids=[e.name for e in CATALOGUE if e.config])
def test_conversion_knows_every_method(entry: Entry) -> None:
    row = row_of({"peft_type": entry.name.upper()})
    assert (row.name, row.update) == (entry.title, entry.update)


def test_any_module_may_be_imported_first() -> None:
    """Methods need the engine, controllers need methods: in no order is there a circle."""
    modules = sorted(
        {*(entry.module for entry in CATALOGUE), *(f"lora_squeeze.methods.{n}" for n in ("control", "callback"))}
    )
    script = """if True:
        import importlib, os, sys
        import peft, transformers
        for name in sys.argv[1:]:
            child = os.fork()
            if not child:
                importlib.import_module(name)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, name
    """
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_readme_and_docs_have_the_table() -> None:
    for name, link in (("README.md", "."), ("docs/methods.md", "")):
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = text.partition(BEGIN)[2].partition(END)[0].strip()
        assert shown == as_markdown(link), "write it anew: python -m lora_squeeze.methods"


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(path, ".")
    assert path.read_text() == f"before\n{BEGIN}\n{as_markdown('.')}\n{END}\nafter\n"


def test_the_command_lists_them_all(tmp_path: Path) -> None:
    listed = command(tmp_path, "methods").out
    assert all(name in listed for name in NAMES)
    found = json.loads(command(tmp_path, "methods", "--json").out)
    assert [entry["name"] for entry in found] == NAMES
    assert found[0]["becomes"] == becomes(CATALOGUE[0])


def test_the_command_tells_one_in_full(tmp_path: Path) -> None:
    told = command(tmp_path, "methods", "nola").out
    assert "NOLA (arXiv 2310.02556), adapters" in told
    assert "lora-squeeze train MODEL DATA -o OUT --method nola --rank 8" in told
    assert "learning rate: 3 times that of a LoRA" in told
    assert json.loads(command(tmp_path, "methods", "nola", "--json").out)["config"] == "NolaConfig"


def test_the_learning_rate_of_training_is_that_of_the_method_unless_given(tmp_path: Path) -> None:
    def peak(**changes: Any) -> float:
        return TrainSettings("model", "data", tmp_path / "out", **changes).peak_rate

    assert peak() == peak(method="wara") == peak(method="loha") == 2e-4
    assert peak(method="svfit") == peak(method="SVFIT") == pytest.approx(30 * peak())
    assert peak(method="vera") == pytest.approx(10 * peak()), "one of PEFT's own"
    assert peak(method="svfit", learning_rate=1e-3) == 1e-3
    settings = TrainSettings("model", "data", tmp_path / "out", method="svfit")
    assert settings.to_json()["learning_rate"] == settings.peak_rate


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    refused = command(tmp_path, "methods", "nolla")
    assert refused.code == 1
    assert "no method 'nolla' in this catalogue; there are nola" in refused.err


def test_a_name_that_peft_has_already_stays_its_own() -> None:
    from peft import VeraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, register

    class Mine(AdapterConfig):
        pass

    register("vera", Mine, Delta)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.VERA] is VeraConfig
    with pytest.raises(ValueError, match="the PEFT installed has a method VERA of its own; use that"):
        Mine()
