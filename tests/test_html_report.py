"""The page as text and as a file: what it holds, what it must not hold, and how it is written."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_cases import command
from folder_cases import tree
from page_cases import EVIL, FLAT, LAYERED, RANK, flat_folder, held, layered_folder

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.html_report import page_text, write_page
from lora_squeeze.html_report.charts import charts, layers
from lora_squeeze.report import Report
from lora_squeeze.servers import SERVERS, Verdict, verdict

VLLM = next(server for server in SERVERS if server.name == "vLLM")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return lora_squeeze.inspect(lora_squeeze.load(layered_folder(tmp_path_factory.mktemp("layered") / "in")))


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page_text(report.inspection(), f"my {EVIL} adapter")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of scripts that run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._runs = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._runs = tag == "script" and "type" not in dict(attrs)
        if self._runs:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._runs = False

    def handle_data(self, data: str) -> None:
        if self._runs:
            self.scripts[-1] += data


# --- what it holds --------------------------------------------------------------------------------------------------


def test_the_page_holds_the_json_unchanged(report: Report, text: str) -> None:
    assert held(text) == json.loads(json.dumps(report.inspection()))


def test_names_never_become_markup(report: Report, text: str) -> None:
    assert any(EVIL in row.name for row in report.rows)
    elements = Elements(text)
    assert not [tag for tag, _ in elements.tags if tag in ("img", "b", "iframe")]
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 5
    assert "<img src=x" not in text and "onerror=&quot;" in text, "the title is escaped, JSON spells < as \\u003c"


def test_in_charts_names_are_text_too(report: Report) -> None:
    """Plotly knows a few tags, links among them."""

    def texts(value: Any) -> list[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else [text for part in inner for text in texts(part)]

    found = [text for figure in charts(report.inspection()).values() for text in texts(json.loads(figure.to_json()))]
    assert any("&lt;img src=x" in text for text in found)
    assert not [text for text in found if re.search(r"<(?!br>|extra>|/extra>)", text)]


def test_nothing_points_out_of_the_file(text: str) -> None:
    for tag, attributes in Elements(text).tags:
        assert not {"src", "href", "action", "data"} & attributes.keys(), (tag, attributes)


def test_only_the_two_scripts_in_it_may_run(text: str) -> None:
    elements = Elements(text)
    policy = next(a["content"] or "" for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in elements.scripts}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == digests and len(digests) == 2
    assert "default-src 'none'" in policy and "script-src 'unsafe" not in policy and "http" not in policy
    assert sum("plotly.js v" in script for script in elements.scripts) == 1, "Plotly is in it once"


def test_every_rank_that_can_be_shown_has_an_answer_of_every_server(report: Report, text: str) -> None:
    servers = held(text, "servers")
    assert servers["names"] == [server.name for server in SERVERS] and len(servers["sources"]) == len(SERVERS)
    for point in (*report.curve, *report.best_curve):
        assert len(servers["ranks"][str(point.largest_rank)]) == len(SERVERS)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (1, Verdict("yes", "fits the default limit of 16")),
        (16, Verdict("yes", "fits the default limit of 16")),
        (17, Verdict("option", "needs --max-lora-rank 32")),
        (64, Verdict("option", "needs --max-lora-rank 64")),
        (257, Verdict("option", "needs --max-lora-rank 320")),
        (512, Verdict("option", "needs --max-lora-rank 512")),
        (513, Verdict("no", "takes no rank above 512")),
    ],
)
def test_vllm_takes_ranks_up_to_listed_limits(rank: int, expected: Verdict) -> None:
    assert verdict(VLLM, rank, ["embedding"]) == expected
    assert verdict(VLLM, rank, ["module to save"]).answer == "no"


def test_the_other_readers_take_any_rank() -> None:
    for server in SERVERS:
        if server is not VLLM:
            assert verdict(server, 1000, ["module to save"]).answer == "yes"
        assert server.source


# --- charts ---------------------------------------------------------------------------------------------------------


def test_the_heat_map_has_a_cell_per_layer_and_kind(report: Report) -> None:
    found = charts(report.inspection())
    assert set(found) == {"chart-energy", "chart-ranks", "chart-others"}
    (heat,) = found["chart-ranks"].data
    assert heat.type == "heatmap" and list(heat.x) == ["0", "1", "2", "10"], "layers in the order of their numbers"
    ranks = {row.name: row.entropy_rank for row in report.rows}
    kinds = list(layers(report.inspection()["modules"])[0])
    for kind, row in zip(kinds, heat.z, strict=True):
        for layer, value in zip(heat.x, row, strict=True):
            assert value == ranks.get(f"model.layers.{layer}.{kind}")
    (rest,) = found["chart-others"].data
    assert rest.type == "bar" and list(rest.x) == [ranks["lm_head"]]


def test_an_adapter_without_layers_gets_bars(tmp_path: Path) -> None:
    report = lora_squeeze.load(flat_folder(tmp_path / "in")).report
    found = charts(report.inspection())
    assert set(found) == {"chart-energy", "chart-ranks"}
    (bars,) = found["chart-ranks"].data
    assert bars.type == "bar" and list(bars.x) == [row.entropy_rank for row in report.rows]
    assert found["chart-ranks"].layout.yaxis.ticktext == tuple(f"&lt;b&gt;{n[3:-4]}&lt;/b&gt;" for n in sorted(FLAT))


def test_the_curves_are_those_of_the_json(report: Report) -> None:
    data = report.inspection()
    traces = {trace.name: trace for trace in charts(data)["chart-energy"].data}
    for name, points in (
        ("all modules, one rank", data["curve"]),
        ("best rank for each, same size", data["best_curve"]),
    ):
        assert list(traces[name].x) == [point["rank"] for point in points]
        assert list(traces[name].y) == pytest.approx([100 * point["energy"] for point in points])
    assert list(traces["q_proj"].y) == pytest.approx([100 * e for e in data["kinds"][0]["energy_at_rank"]])
    assert len(traces) == 2 + len(data["kinds"])


@pytest.mark.parametrize(
    ("names", "kinds", "others"),
    [
        (["model.layers.3.a.q", "model.layers.12.a.q"], {"a.q": [3, 12]}, []),
        (["x.0.experts.7.up", "x.0.experts.8.up"], {"experts.*.up": [0]}, []),
        (["vision.layers.0.q", "text.layers.0.q"], {"vision.layers.*.q": [0], "text.layers.*.q": [0]}, []),
        (["lm_head", "x.1.q"], {"q": [1]}, ["lm_head"]),
        (["head", f"x.{'9' * 5000}.q", "x.²"], {}, ["head", f"x.{'9' * 5000}.q", "x.²"]),
    ],
)
def test_layers_are_the_first_number_of_a_name(
    names: list[str], kinds: dict[str, list[int]], others: list[str]
) -> None:
    cells, rest = layers([{"name": name} for name in names])
    assert {kind: list(row) for kind, row in cells.items()} == kinds
    assert sum(len(found) for row in cells.values() for found in row.values()) == len(names) - len(others)
    assert [module["name"] for module in rest] == others


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_page_is_replaced_only_with_force(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(LoraSqueezeError, match=r"page\.html exists already; choose another name, or give --force"):
        write_page(report, path, name="a")
    assert path.read_text() == "mine"
    write_page(report, path, name="a", force=True)
    assert held(path.read_text(encoding="utf-8"))["rank"] == RANK
    assert os.listdir(tmp_path) == ["page.html"]
    (tmp_path / "plain.txt").touch()
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode, "readable to whom files are readable here"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.json", "a page ends in .html"),
        ("adapter_model.safetensors", "a page ends in .html"),
        ("none/page.html", "there is no folder .*none; make it first"),
        ("folder.html", "is a folder; name a file"),
        ("dangling.html", "exists already"),
    ],
)
def test_other_targets_are_refused(report: Report, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "dangling.html").symlink_to("nowhere")
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match=text):
        write_page(report, tmp_path / name, name="a")
    assert tree(tmp_path) == before


def test_a_disk_that_fails_leaves_the_old_page_and_no_litter(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoraSqueezeError, match="cannot be written: No space left on device; choose another place"):
        write_page(report, path, name="a", force=True)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_without_plotly_the_cure_is_named(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_squeeze.html_report.page.find_spec", lambda name: None)
    with pytest.raises(LoraSqueezeError, match=r"not installed: pip install 'lora-squeeze\[report\]'"):
        write_page(report, tmp_path / "page.html", name="a")


def test_the_command_writes_the_page_of_its_json(tmp_path: Path) -> None:
    folder = layered_folder(tmp_path / "in")
    out = tmp_path / "page.html"
    budget = ("--rank", 8, "--allocate", "global", "--ranks", "4,8,16")
    data = command(tmp_path, "inspect", folder, *budget, "--html", out, "--json")
    assert (data.code, data.err) == (0, "")
    found = json.loads(data.out)
    assert held(out.read_text(encoding="utf-8")) == found
    assert found["plan"]["request"] == {"rank": 8, "allocate": "global", "ranks": [4, 8, 16]}
    assert set(found["plan"]["ranks"].values()) <= {0, 4, 8, 16}
    again = command(tmp_path, "inspect", folder, "--html", out)
    assert (again.code, again.out) == (1, "") and "exists already" in again.err
    table = command(tmp_path, "inspect", folder, "--html", out, "--force")
    assert table.code == 0 and table.out.endswith(f"page written to {out}\n")
    assert held(out.read_text(encoding="utf-8"))["plan"] is None
    assert all(name in command(tmp_path, "inspect", folder, "--each").out for name in (*LAYERED, EVIL))
