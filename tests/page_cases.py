"""What the tests of the page share: adapters to report on, the report as the page holds it, and a browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PREFIX, plain_config, plain_tensors, write_folder
from playwright.sync_api import Browser, sync_playwright

RANK = 40  # above what vLLM takes as it starts, and above one of its limits
EVIL = '</script><img src=x onerror="document.title=1">'
KINDS = {"self_attn.q_proj": (48, 44), "mlp.down_proj": (44, 50)}
LAYERED = {f"model.layers.{i}.{kind}": shape for i in (0, 1, 2, 10) for kind, shape in KINDS.items()}
FLAT = {f"<b>{name}</b>": (44, 46) for name in ("first", "second")}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def layered_folder(folder: Path) -> Path:
    """Modules in layers, one of them with a hostile name, one in no layer, and an embedding beside."""
    shapes = {**LAYERED, f"model.layers.1.{EVIL}": (41, 43), "lm_head": (60, 44)}
    tensors = plain_tensors(shapes, RANK, kind="decaying")
    tensors[f"{PREFIX}model.embed_tokens.weight"] = torch.ones(60, 44)
    return write_folder(folder, tensors, plain_config(r=RANK, lora_alpha=RANK))


def flat_folder(folder: Path) -> Path:
    """Two modules without numbers in their names."""
    return write_folder(folder, plain_tensors(FLAT, RANK, kind="decaying"), plain_config(r=RANK))


def held(page: str, element: str = "report") -> Any:
    """The JSON in an element of the page's text, found as a parser finds it: up to the first end tag."""
    match = re.search(rf'<script type="application/json" id="{element}">(.*?)</script', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium: CHROMIUM, one on the path, or Playwright's own; the test is skipped without one."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
        found = found or (own if Path(own).exists() else None)
        if found is None:
            pytest.skip(
                "no Chromium: install one (apt-get install chromium, or .venv/bin/playwright install chromium), "
                "or set CHROMIUM=path"
            )
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield browser
        finally:
            browser.close()
