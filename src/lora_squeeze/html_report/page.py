"""The page as text, and the file: template, style, script, figures and the JSON of the report in one."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.report import Report
from lora_squeeze.servers import SERVERS, verdict

_MARK = re.compile(r"\{\{(\w+)\}\}")


def check_target(path: Path, *, force: bool) -> None:
    """Refuse what `write_page` would refuse, before any work is done.

    Raises:
        LoraSqueezeError: Plotly is not installed, the name is not that of a page, the folder is missing, or the file
            exists and `force` is not given.
    """
    if find_spec("plotly") is None:
        raise LoraSqueezeError(
            "the page is drawn with Plotly, which is not installed: pip install 'lora-squeeze[report]'"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise LoraSqueezeError(f"{path}: a page ends in .html; name it so, lest a file of another kind be replaced")
    if not path.parent.is_dir():
        raise LoraSqueezeError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise LoraSqueezeError(f"{path} is a folder; name a file")
    if not force and os.path.lexists(path):
        raise LoraSqueezeError(f"{path} exists already; choose another name, or give --force to replace it")


def write_page(report: Report, path: str | os.PathLike[str], *, name: str, force: bool = False) -> None:
    """Write the page of a report, as a whole or not at all.

    Args:
        report: from `lora_squeeze.inspect`.
        path: the file, ending in .html.
        name: what the page calls the adapter.
        force: replace the file if it is there.

    Raises:
        LoraSqueezeError: see `check_target`; or the file cannot be written.
    """
    path = Path(path).expanduser()
    check_target(path, force=force)
    text = page_text(report.inspection(), name)
    draft = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            draft = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~_umask())
        check_target(path, force=force)  # another process may have written it meanwhile
        draft.replace(path)
    except OSError as error:
        raise LoraSqueezeError(f"{path}: cannot be written: {error.strerror}; choose another place") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def page_text(data: Mapping[str, Any], name: str) -> str:
    """The page as text.

    Args:
        data: what `inspect --json` prints; the page holds it unchanged and takes every number from it.
        name: what the page calls the adapter.

    Notes:
        Names of modules come from a file that is not trusted. They reach the page inside JSON and as text nodes only;
        beside that, the page's own policy lets no script run but the two in it, known by their digests, and no request
        leave it.
    """
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    from lora_squeeze.html_report.charts import charts  # needs Plotly from its first line on

    figures = {key: json.loads(figure.to_json()) for key, figure in charts(data).items()}
    scripts = {"plotly": get_plotlyjs(), "script": _part("page.js")}
    parts = {
        "policy": _policy(scripts.values()),
        "name": html.escape(name),
        "style": _part("page.css"),
        "report": _json(data),
        "servers": _json(_verdicts(data)),
        "figures": _json(figures),
        **scripts,
    }
    return _MARK.sub(lambda mark: parts[mark[1]], _part("page.html"))


def _verdicts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What every server says to every rank that the page can show."""
    carried = data["bytes"]["extra"].keys()
    ranks = sorted({point["largest_rank"] for point in (*data["curve"], *data["best_curve"])})
    return {
        "names": [server.name for server in SERVERS],
        "sources": [f"{server.name}: {server.source}" for server in SERVERS],
        "ranks": {str(rank): [asdict(verdict(server, rank, carried)) for server in SERVERS] for rank in ranks},
    }


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # only ASCII
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _policy(scripts: Any) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # Plotly writes style rules and draws heat maps as data: images.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
