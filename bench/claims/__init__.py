"""What the papers of the methods claim, asked again in small: one module for each method.

    python -m bench.claims NAME ... --out FOLDER

Each module measures in seconds or minutes on a CPU, beside a plain LoRA at equal budget, and ends in findings: the
claim, the figures, and whether it holds here. `FOLDER/NAME.jsonl` has the rows, `FOLDER/README.md` all findings of
the folder.
"""
