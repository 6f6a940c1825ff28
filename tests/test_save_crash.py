"""The crash test of folders once more with what users run: a squeeze saved over an adapter."""

import os
from pathlib import Path

import torch
from adapter_cases import RANK, dense, tail, write_folder
from folder_cases import add_foreign, check_foreign
from test_folder_crash import deaths

import lora_squeeze


def test_killed_at_any_operation_a_save_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    source = lora_squeeze.load(write_folder(tmp_path / "source"))
    target = tmp_path / "parent" / "out"
    source.squeeze(rank=2).save(target)
    add_foreign(target)
    name = next(iter(source.modules))
    seen = set()
    for number in deaths(lambda: source.squeeze(rank=4).save(target, force=True)):
        found = lora_squeeze.load(target)
        seen.add(found.rank)
        error = torch.linalg.norm(dense(source, name) - dense(found, name)).item()
        assert abs(error - tail(dense(source, name), found.rank)) < 1e-5, f"a half-written adapter after kill {number}"
        check_foreign(target)
        source.squeeze(rank=2).save(target, force=True)
        assert os.listdir(target.parent) == ["out"], f"litter after kill {number} and a later save"
    assert seen == {2, 4}
    assert lora_squeeze.load(source.format.home).rank == RANK, "the source is as it was"
