"""The methods' claims in small: every experiment runs, and the page says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.claims.__main__ import main, names


@pytest.mark.parametrize("name", names())
def test_an_experiment_runs_and_the_page_tells_its_findings(name: str, tmp_path: Path) -> None:
    main([name, "--out", str(tmp_path), "--quick"])
    lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("run") == 1
    findings = [line for line in lines if line["kind"] == "finding"]
    assert findings
    assert any(line["kind"] == "row" for line in lines)
    page = (tmp_path / "README.md").read_text()
    for finding in findings:
        assert finding["claim"] in page
        assert finding["figures"] in page
