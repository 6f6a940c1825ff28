"""The figures of a demonstration, as table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_squeeze.demo.evaluate import Score
from lora_squeeze.demo.settings import Settings

NEAR = 0.05  # a loss that is higher by less counts as equal


@dataclass(frozen=True)
class Row:
    """One measured model.

    Args:
        name: "base", "source" or "rank N".
        rank: rank of the adapter, 0 for the base model.
        size_bytes: bytes of the adapter's weight file, 0 for the base model.
        energy: mean over the modules of the kept share of the squared singular values; None for the base model.
        score: loss and accuracy on the held-out words.
        folder: the adapter, None for the base model.
    """

    name: str
    rank: int
    size_bytes: int
    energy: float | None
    score: Score
    folder: Path | None


@dataclass(frozen=True)
class DemoResult:
    """What a demonstration found.

    Args:
        base: the model without adapter.
        source: the adapter as trained.
        squeezed: the squeezed adapters, as the ranks were given.
        settings: how the source was trained.
        held_out: number of held-out words measured.
        reused: whether the source was found trained in the output folder.
        seconds: wall-clock time by part.
        output: the folder with adapters, results.json and results.png.
    """

    base: Row
    source: Row
    squeezed: tuple[Row, ...]
    settings: Settings
    held_out: int
    reused: bool
    seconds: dict[str, float]
    output: Path

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows in the order of the table."""
        return (self.base, self.source, *self.squeezed)

    @property
    def json_path(self) -> Path:
        """The figures."""
        return self.output / "results.json"

    @property
    def picture_path(self) -> Path:
        """The picture."""
        return self.output / "results.png"

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON-ready data; folders are relative to the output folder."""
        return {
            "settings": asdict(self.settings),
            "held_out_words": self.held_out,
            "source_reused": self.reused,
            "seconds": {part: round(value, 1) for part, value in self.seconds.items()},
            "rows": [
                {
                    "name": row.name,
                    "rank": row.rank,
                    "size_bytes": row.size_bytes,
                    "energy": row.energy,
                    **asdict(row.score),
                    "folder": row.folder.name if row.folder else None,
                }
                for row in self.rows
            ],
        }

    def write_json(self) -> None:
        """Write the figures beside the adapters, as a whole or not at all."""
        draft = self.json_path.with_name(".results.json.new")
        draft.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        draft.replace(self.json_path)

    def closing_lines(self) -> list[str]:
        """What was found and where it is, for a person."""
        spent = ", ".join(f"{part} {value:.0f} s" for part, value in self.seconds.items())
        return [*self.verdict(), f"Adapters, figures and picture: {self.output} ({spent})"]

    def verdict(self) -> list[str]:
        """The smallest rank whose loss is not above the source's, in a sentence; empty where there is none."""
        limit = self.source.score.loss * (1.0 + NEAR)
        near = [row for row in self.squeezed if row.score.loss <= limit]
        if not near:
            return []
        row = min(near, key=lambda row: row.rank)
        return [
            f"At rank {row.rank} the loss is at most {NEAR:.0%} above that of rank {self.source.rank}, "
            f"in a file {self.source.size_bytes / row.size_bytes:.1f} times smaller."
        ]

    def table(self) -> Any:
        """The figures as a rich table."""
        from rich.table import Table

        title = f"{self.held_out} held-out words: nats per token, share right"
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        for column in ("file size", "energy kept", "loss", "tokens", "words"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.name if row.name != "source" else f"source, rank {row.rank}",
                size_text(row.size_bytes) if row.size_bytes else "-",
                "-" if row.energy is None else f"{row.energy:.1%}",
                f"{row.score.loss:.3f}",
                f"{row.score.token_accuracy:.1%}",
                f"{row.score.word_accuracy:.1%}",
                end_section=row is self.source,
            )
        return table


def size_text(size_bytes: int) -> str:
    """Bytes as megabytes, powers of ten."""
    return f"{size_bytes / 1e6:#.3g} MB"
