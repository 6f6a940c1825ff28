"""Every rule: a file that is a case of it, and its sibling that is not; the verdict, its JSON and its words."""

from __future__ import annotations

import json
from pathlib import Path

import check_cases as cases
import pytest
from check_cases import TRIGGERS, Trigger

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.readers import READERS, Finding, Verdict, check
from lora_squeeze.readers.rule import Rule

RULES = {rule.id: rule for reader in READERS for rule in reader.rules}
PLAIN = {
    "peft": cases.peft(),
    "mlx": cases.mlx(),
    "gguf": cases.gguf(),
    "diffusers": cases.diffusers(),
    "kohya": cases.kohya(),
}


def verdict_on(trigger: Trigger, folder: Path, plain: bool = False) -> Verdict:
    build = trigger.plain if plain else trigger.build
    folder.mkdir(exist_ok=True)
    return check(build(folder), trigger.reader, max_rank=trigger.max_rank)[0]


def named(verdict: Verdict) -> dict[str, Finding]:
    return {finding.rule: finding for finding in verdict.findings}


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert TRIGGERS.keys() == RULES.keys()


@pytest.mark.parametrize("rule", sorted(TRIGGERS))
def test_a_rule_is_found_in_its_case_and_not_in_the_sibling(rule: str, tmp_path: Path) -> None:
    trigger = TRIGGERS[rule]
    found, sibling = verdict_on(trigger, tmp_path / "case"), verdict_on(trigger, tmp_path / "plain", plain=True)
    assert rule in named(found) and rule not in named(sibling)
    assert named(found)[rule].severity == RULES[rule].severity
    assert {finding.rule for finding in sibling.findings if finding.severity != "note"} <= {"format"}
    assert found.read_as_meant == all(finding.severity == "note" for finding in found.findings)
    if RULES[rule].severity != "note":
        assert not found.read_as_meant and found.answer != "yes"
    finding = named(found)[rule]
    assert finding.text and not set("{}") & set(finding.text + finding.cure), "all fields are filled in"
    assert finding.cure or finding.severity == "note" or rule in ("vllm-alora", "vllm-replication", "vllm-qalora")


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_a_rule_says_where_it_is_read(rule: Rule) -> None:
    assert len(rule.source) > len(rule.id.partition("-")[0]), f"{rule.id}: {rule.source!r}"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.key)
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_reader_takes_its_formats_and_no_others(reader: cases.Any, name: str, tmp_path: Path) -> None:
    found = check(PLAIN[name](tmp_path), reader.key)[0]
    assert found.read_as_meant == (name in reader.formats), found
    if name not in reader.formats:
        assert [finding.rule for finding in found.findings if finding.severity != "note"] == ["format"]
        assert found.answer == "no"


def test_the_cure_of_a_format_is_a_conversion_of_the_same_kind_of_model(tmp_path: Path) -> None:
    folder = cases.peft(base_model_name_or_path="org/model")(tmp_path)
    cure = f"lora-squeeze convert {folder} -o OUT --to"
    assert check(folder, "mlx-lm")[0].findings[0].cure == f"{cure} mlx"
    assert check(folder, "llama.cpp")[0].findings[0].cure == f"{cure} gguf --base org/model"
    assert check(folder, "ollama", base="mine")[0].findings[0].cure == f"{cure} gguf --base mine"
    image = cases.kohya()(tmp_path)
    assert check(image, "vllm")[0].findings[0].cure == ""


def test_the_cure_of_dora_names_rank_and_base(tmp_path: Path) -> None:
    folder = TRIGGERS["vllm-dora"].build(tmp_path)
    for reader, form in (("vllm", "peft"), ("llama.cpp", "gguf")):
        cures = [f.cure for f in check(folder, reader, base="B")[0].findings]
        assert cures[0] == f"lora-squeeze convert {folder} -o OUT --to {form} --rank 16 --base B"


@pytest.mark.parametrize(("rank", "asked", "rule"), [
    (16, None, None), (17, None, "vllm-rank-option"), (512, None, "vllm-rank-option"), (513, None, "vllm-rank"),
    (16, 16, None), (17, 16, "vllm-rank"), (17, 32, None),
])  # fmt: skip
def test_the_rank_limit_of_vllm(rank: int, asked: int | None, rule: str | None, tmp_path: Path) -> None:
    found = check(cases.peft(rank=rank)(tmp_path), "vllm", max_rank=asked)[0]
    assert [finding.rule for finding in found.findings] == ([] if rule is None else [rule])
    assert found.read_as_meant == (rule != "vllm-rank")


def test_a_rank_that_only_the_configuration_has_counts_too(tmp_path: Path) -> None:
    folder = cases.peft(rank_pattern={"nothing": 64})(tmp_path)
    assert "vllm-rank" in named(check(folder, "vllm", max_rank=16)[0])


def test_limits_and_readers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    folder = cases.peft()(tmp_path)
    with pytest.raises(
        LoraSqueezeError, match="vLLM cannot be started with a rank limit of 24: choose one of 1, 8, 16"
    ):
        check(folder, "vllm", max_rank=24)
    with pytest.raises(LoraSqueezeError, match="max_rank must be a whole number from 1, got 0"):
        check(folder, "sglang", max_rank=0)
    with pytest.raises(LoraSqueezeError, match="unknown reader 'word': choose one of peft, vllm, "):
        check(folder, "word")


@pytest.mark.parametrize("name", ["lorax", "transformers", "mlx", "kohya"])
def test_other_names_of_readers_are_known(name: str, tmp_path: Path) -> None:
    assert check(cases.peft()(tmp_path), name)[0].reader in ("tgi", "peft", "mlx-lm", "sd-scripts")


def test_only_files_that_nobody_can_read_are_errors(tmp_path: Path) -> None:
    folder = cases.peft()(tmp_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoraSqueezeError, match="not valid JSON"):
        check(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(LoraSqueezeError, match="expected an object, found list"):
        check(folder)
    file = cases.diffusers(settings={})(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LoraSqueezeError):
        check(file)
    with pytest.raises(LoraSqueezeError, match="no such folder"):
        check(tmp_path / "nothing")


@pytest.mark.parametrize("change", [
    {"r": "eight"}, {"r": 0}, {"lora_alpha": None}, {"rank_pattern": [1]}, {"rank_pattern": {"(": 4}},
    {"alpha_pattern": {"q_proj": "x"}}, {"target_modules": 7}, {"modules_to_save": 3},
], ids=str)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_reported_not_raised(change: dict[str, object], tmp_path: Path) -> None:
    for found in check(cases.peft(**change)(tmp_path)):
        assert not found.read_as_meant and found.answer == "no", found.reader


def test_several_adapters_in_one_file_are_described(tmp_path: Path) -> None:
    def both(tensors: dict[str, cases.Tensor]) -> dict[str, cases.Tensor | None]:
        copies = {key.replace(".weight", f".{name}.weight"): t for key, t in tensors.items() for name in ("one", "two")}
        return dict.fromkeys(tensors) | copies

    found = named(check(cases.peft(both)(tmp_path), "peft")[0])
    assert "one, two" in found["peft-names"].text


def test_the_json_has_what_it_promises(tmp_path: Path) -> None:
    found = check(TRIGGERS["sglang-scale"].build(tmp_path), "sglang")[0]
    data = json.loads(json.dumps(found.to_json()))
    assert data.keys() == {"reader", "version", "read_as_meant", "findings"}
    assert data["reader"] == "sglang" and data["read_as_meant"] is False
    finding = next(row for row in data["findings"] if row["rule"] == "sglang-scale")
    assert finding.keys() >= {"rule", "severity", "modules", "text", "cure"}
    assert sorted(finding["modules"]) == sorted(cases.SHAPES)
    assert finding["factor"] == pytest.approx(8**-0.5)  # alpha / r over alpha / sqrt(r)


def test_the_worst_factor_is_the_one_furthest_from_one(tmp_path: Path) -> None:
    # Meant are 3 / 8 and 48 / 8; one scale for all is 12 / 8: four times the first, a quarter of the second.
    patterns = {r"0\.self_attn\.q_proj": 3, r"1\.self_attn\.q_proj": 60}
    found = named(check(cases.peft(alpha_pattern=patterns)(tmp_path), "tgi")[0])["tgi-scale"]
    assert found.factor == pytest.approx(12 / 60) and "(x 0.2)" in found.text
    assert found.modules == tuple(name for name in cases.SHAPES if "q_proj" in name)
