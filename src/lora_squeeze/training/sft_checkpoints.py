"""Checkpoints of `lora-squeeze train`: where they are, which one to go on from, when they go.

They have a folder of their own beside the output, OUT-checkpoints, since the output is written as a whole and only at
the end. They go once the output is there. The file that a checkpoint gets last shows that it is whole; one that was cut
short is passed over.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training.sft_settings import TrainSettings

_SETTINGS_NAME = "settings.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Options that may differ when a training is taken up again.
_FREE = {"output", "force", "resume", "save_steps", "report_to", "cpu"}


def last_checkpoint(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from, None for a beginning. Changes nothing.

    Raises:
        LoraSqueezeError: checkpoints are there and are to be neither used nor replaced, or are of another training, or
            something else is in their place.
    """
    folder = settings.checkpoints
    if not folder.exists() or not any(folder.iterdir()):
        return None
    stored = _json(folder / _SETTINGS_NAME)
    if stored is None:
        raise LoraSqueezeError(
            f"checkpoints would go to {folder}, which holds something else; move it away, or choose another output"
        )
    found = whole_checkpoints(settings)
    if not found:
        return None
    if not settings.resume:
        if settings.force:
            return None
        raise LoraSqueezeError(
            f"{folder} holds checkpoints of an unfinished training; go on with --resume (resume=True), or begin anew "
            "with --force (force=True)"
        )
    asked = _compared(settings)
    changed = [
        f"{key} was {stored.get(key)} and is {value}" for key, value in asked.items() if stored.get(key) != value
    ]
    if changed:
        raise LoraSqueezeError(
            f"the checkpoints in {folder} are of another training: {', '.join(changed)}; resume with the same options, "
            "or begin anew with --force (force=True) and without --resume"
        )
    return max(found, key=_step)


@contextmanager
def checkpoint_folder(settings: TrainSettings, *, keep: bool) -> Iterator[None]:
    """The folder is there inside, marked as ours; it goes if the block fails before the first checkpoint.

    Args:
        keep: whether to go on from what is in it; else it is emptied.
    """
    folder = settings.checkpoints
    if not keep:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / _SETTINGS_NAME).write_text(json.dumps(_compared(settings), indent=2), encoding="utf-8")
    try:
        yield
    except BaseException:
        if not whole_checkpoints(settings):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def whole_checkpoints(settings: TrainSettings) -> list[Path]:
    """Those to go on from."""
    folder = settings.checkpoints
    names = list(folder.iterdir()) if folder.is_dir() else []
    return [path for path in names if _NAME.fullmatch(path.name) and _is_whole(path, settings)]


def remove_checkpoints(settings: TrainSettings) -> None:
    """The training is finished."""
    shutil.rmtree(settings.checkpoints)


def _compared(settings: TrainSettings) -> dict[str, Any]:
    return {key: value for key, value in settings.to_json().items() if key not in _FREE}


def _is_whole(checkpoint: Path, settings: TrainSettings) -> bool:
    """Whether all of it was written, and there are steps left: from one of the last step, transformers 5.23 trains one
    step too many."""
    from lora_squeeze.training.callback import STATISTICS_NAME

    state = _json(checkpoint / "trainer_state.json")
    written = state is not None and (not settings.data_aware or (checkpoint / STATISTICS_NAME).is_file())
    return written and state["global_step"] < state["max_steps"]


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
