"""Every method that this package adds or completes: one list that the code, the README table and the docs read.

Nothing heavy is imported here: PEFT and torch come with a method's own module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BEGIN = "<!-- the catalogue: written by python -m lora_squeeze.methods -->"
END = "<!-- end of the catalogue -->"


@dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        name: on the command line and, in capitals, as `peft_type`.
        title: for people.
        paper: its number on arXiv.
        family: "adapters", other parameterisations of the update; "ranks", methods that find the rank while training.
        module: where it lives.
        config: name of its configuration class in that module; "" for PEFT's own methods, which the module completes.
        update: the change of a weight W (out, in), as a formula.
        route: "exact", a plain LoRA of lower rank than the matrix; "squeezed", an update of full rank.
        rank: of the exact LoRA, a formula; "" where there is none.
        record: file and section with its measurements.
        rate: the learning rate that did best, as a multiple of a LoRA's, on the grid 1, 3, 10, 30, ... (the section
            "classification" of the record); 1 also where it has not been measured.
    """

    name: str
    title: str
    paper: str
    family: str
    module: str
    config: str
    update: str
    route: str
    rank: str = ""
    record: str = field(kw_only=True)
    rate: float = field(default=1, kw_only=True)


_ADAPTERS = "lora_squeeze.methods.adapters."
_RANKS = "lora_squeeze.methods.ranks."
_RATES_OF_PEFT = {"vera": 10.0, "unilora": 10.0}  # see `Entry.rate`
_CLAIMS = "records/2026-11-29-claims/README.md#"

CATALOGUE: tuple[Entry, ...] = (
    Entry("nola", "NOLA", "2310.02556", "adapters", _ADAPTERS + "nola", "NolaConfig",
          "alpha / r B A, both mixed from frozen random matrices", "exact", "r",
          record=_CLAIMS + "classification", rate=3),
    Entry("tera", "TeRA", "2509.03234", "adapters", _ADAPTERS + "tera", "TeraConfig",
          "a Tucker network of frozen random tensors with trained diagonals, as a matrix", "squeezed",
          record=_CLAIMS + "tera", rate=10),
    Entry("loldu", "LoLDU", "2410.13618", "adapters", _ADAPTERS + "loldu", "LolduConfig",
          "alpha / r P L_r diag(z - z0) U_r of W = P L diag(z0) U", "exact", "r",
          record=_CLAIMS + "classification", rate=100),
    Entry("svfit", "SVFit", "2409.05926", "adapters", _ADAPTERS + "svfit", "SvfitConfig",
          "U_r diag(s - s0) V_r^T of W = U diag(s0) V^T", "exact", "r", record=_CLAIMS + "svfit", rate=30),
    Entry("loraxs", "LoRA-XS", "2405.17604", "adapters", _ADAPTERS + "lora_xs", "LoraXsConfig",
          "alpha / r U_r R diag(s_r) V_r^T of W = U diag(s) V^T", "exact", "r",
          record=_CLAIMS + "classification", rate=10),
    Entry("paca", "PaCA", "2503.01905", "adapters", _ADAPTERS + "paca", "PacaConfig",
          "alpha / r D in r columns of W, zero elsewhere", "exact", "r", record=_CLAIMS + "paca", rate=3),
    Entry("snella", "SNELLA", "2510.24037", "adapters", _ADAPTERS + "snella", "SnellaConfig",
          "the largest entries of a kernel of two factors, zero elsewhere", "squeezed",
          record=_CLAIMS + "snella", rate=10),
    Entry("wara", "WaRA", "2506.24092", "adapters", _ADAPTERS + "wara", "WaraConfig",
          "alpha / r sum over the n wavelet bands b of L_b^T B A L_b", "exact", "n r", record=_CLAIMS + "wara"),
    Entry("blocklora", "Block-LoRA", "2501.16720", "adapters", _ADAPTERS + "block_lora", "BlockLoraConfig",
          "alpha / r (sum of B_i) A, or B A with A repeated over n parts of the input", "exact", "r / n, or r",
          record=_CLAIMS + "classification"),
    Entry("hydra", "Hydra", "2309.06922", "adapters", _ADAPTERS + "hydra_adapter", "HydraConfig",
          "s (B_p A_p + B_s A_s W); the bias too", "exact", "r + r_s", record=_CLAIMS + "hydra"),
    Entry("queryable", "Queryable LoRA", "2605.08423", "adapters", _ADAPTERS + "queryable_lora", "QueryableConfig",
          "alpha / r B M(x) A, M mixed from shared atoms by the input", "exact", "r, once its routes are fixed",
          record=_CLAIMS + "queryable"),
    Entry("lift", "LIFT", "2506.00772", "adapters", _ADAPTERS + "lift", "LiftConfig",
          "r (in + out) chosen entries, the largest of a low-rank approximation of W", "squeezed",
          record=_CLAIMS + "lift", rate=3),
    Entry("sara", "SaRA", "2409.06633", "adapters", _ADAPTERS + "sara", "SaraConfig",
          "chosen entries, the smallest of W", "squeezed", record=_CLAIMS + "sara", rate=3),
    Entry("shira", "SHiRA", "2406.13175", "adapters", _ADAPTERS + "shira_masks", "",
          "r (out + in) entries that a mask chooses", "squeezed", record=_CLAIMS + "shira", rate=3),
    Entry("randlora", "RandLoRA", "2502.00987", "adapters", _ADAPTERS + "randlora_paper", "",
          "alpha / r / sqrt(n) sum of n products of frozen random matrices, rescaled", "squeezed",
          record=_CLAIMS + "randlora", rate=0.3),
    Entry("randloraranks", "RandLoRA at lower ranks", "2502.00987", "adapters", _ADAPTERS + "randlora_ranks",
          "RandLoraRanksConfig", "as RandLoRA, sums of bases multiplied group by group", "exact",
          "r ceil(n / together)", record=_CLAIMS + "classification"),
    Entry("projlora", "Uni-LoRA with other projections", "2506.00799", "adapters", _ADAPTERS + "projlora",
          "ProjLoraConfig", "B A, all factors of the network from one vector", "exact", "r",
          record=_CLAIMS + "classification", rate=10),
    Entry("dylora", "DyLoRA", "2210.07558", "ranks", _RANKS + "dylora", "DyloraConfig",
          "alpha / b B A of the first b components, any b up to r", "exact", "b", record=_CLAIMS + "dylora"),
    Entry("matryoshka", "MatryoshkaLoRA", "2605.07850", "ranks", _RANKS + "matryoshka", "MatryoshkaConfig",
          "s_k B A of the first k components, any k up to r", "exact", "k", record=_CLAIMS + "matryoshka"),
    Entry("sora", "SoRA", "2311.11696", "ranks", _RANKS + "sora", "SoraConfig",
          "alpha / r B diag(g) A, gates g thresholded to zero", "exact", "gates of the layer that are left",
          record=_CLAIMS + "sora"),
    Entry("trp", "Trained rank pruning", "1812.02402", "ranks", _RANKS + "trp", "TrpConfig",
          "a dense matrix, or alpha / r B A, cut to a low rank again and again", "exact",
          "the rank found for each layer", record=_CLAIMS + "trp", rate=0.3),
    Entry("maestro", "Maestro", "2308.14929", "ranks", _RANKS + "maestro", "MaestroConfig",
          "alpha / r U V^T, its columns ordered by dropout and a group lasso", "exact",
          "the rank found for each layer", record=_CLAIMS + "maestro"),
    Entry("blora", "Bayesian-LoRA", "2406.13046", "ranks", _RANKS + "blora", "BloraConfig",
          "alpha / r B diag(E) A, all rounded to bits that gates choose", "exact", "the rank found for each layer",
          record=_CLAIMS + "blora"),
    Entry("diffora", "DiffoRA", "2502.08905", "ranks", _RANKS + "diffora", "DifforaConfig",
          "alpha / r B A in layers that a search chooses, shared factors or none in the others", "exact", "r",
          record=_CLAIMS + "diffora"),
)  # fmt: skip


def adapter_entries() -> dict[str, Entry]:
    """`peft_type` -> entry, of the methods that are PEFT tuners of this package."""
    return {entry.name.upper(): entry for entry in CATALOGUE if entry.family in ("adapters", "ranks") and entry.config}


def rate_factor(name: str | None) -> float:
    """The `rate` of a method of the catalogue or of PEFT, by its name in either case; 1 for what is not listed."""
    rates = {entry.name: entry.rate for entry in CATALOGUE} | _RATES_OF_PEFT
    return rates.get((name or "").lower(), 1)


def becomes(entry: Entry) -> str:
    """How a method's update becomes a plain LoRA."""
    return f"exact, rank {entry.rank}" if entry.route == "exact" else "squeezed"


def as_markdown(link: str = "") -> str:
    """The catalogue as a table for README and docs; `link` as for `write_into`."""
    lines = ["| method | family | update of W | as a plain LoRA | paper |", "|---|---|---|---|---|"]
    for entry in CATALOGUE:
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"
        title = f"[{entry.title}]({link}/{entry.record})" if link else entry.title
        update = entry.update.replace("|", "\\|")
        lines.append(f"| {title} (`{entry.name}`) | {entry.family} | {update} | {becomes(entry)} | {paper} |")
    return "\n".join(lines)


def write_into(path: Path, link: str) -> None:
    """Put the table between its two marks in a Markdown file.

    Args:
        path: the file.
        link: how the folder of this repository is reached from it, for links to records; "" leaves them out.
    """
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{as_markdown(link)}\n{end}{after}", encoding="utf-8")
