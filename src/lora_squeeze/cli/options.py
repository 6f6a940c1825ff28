"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_squeeze.cli.docs import option_help
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    import torch

    from lora_squeeze.adapter import Adapter


def option(name: str, *flags: str, module: str = "post_squeeze", function: str = "squeeze") -> Any:
    """An option with the help text of a function's argument."""
    return typer.Option(*flags, help=option_help(module, function)[name], show_default=False)


AdapterArgument = Annotated[
    str, typer.Argument(help="Adapter of any format: a folder, a file, or a hub id such as user/adapter.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder or file to write.", show_default=False)]
Rank = Annotated[int | None, option("rank")]
Energy = Annotated[float | None, option("energy")]
Error = Annotated[float | None, option("error")]
Size = Annotated[str | None, option("size")]
Params = Annotated[int | None, option("params")]
SvRatio = Annotated[float | None, option("sv_ratio")]
SvCumulative = Annotated[float | None, option("sv_cumulative")]
SvFro = Annotated[float | None, option("sv_fro")]
Allocate = Annotated[str | None, option("allocate")]
MinRank = Annotated[int | None, option("min_rank")]
MaxRank = Annotated[int | None, option("max_rank")]
MultipleOf = Annotated[int | None, option("multiple_of")]
Ranks = Annotated[str | None, option("ranks")]
SameRankPer = Annotated[str | None, option("same_rank_per")]
Dtype = Annotated[str | None, option("dtype")]
Device = Annotated[str | None, option("device")]
Method = Annotated[str, option("method")]
Seed = Annotated[int, option("seed")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at the output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Compute and show the figures, write nothing.")]
Subfolder = Annotated[str | None, option("subfolder", module="hub", function="load")]
Revision = Annotated[str | None, option("revision", module="hub", function="load")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Each = Annotated[bool, typer.Option("--each", help="One line per module instead of one per kind of module.")]


def rank_list(text: str | None) -> tuple[int, ...] | None:
    """The ranks in "8,16,32"."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LoraSqueezeError(f"ranks {text!r} are not understood; write whole numbers such as 8,16,32") from None


def load_adapter(adapter: str, subfolder: str | None, revision: str | None) -> Adapter:
    """The adapter that the command line names."""
    from lora_squeeze.hub import load

    return load(adapter, subfolder=subfolder, revision=revision)


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name or a usual short form."""
    if name is None:
        return None
    import torch

    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}
    found = getattr(torch, short.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise LoraSqueezeError(f"dtype {name!r} is not known; choose float32, float16 or bfloat16")
    return found
