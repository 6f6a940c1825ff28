"""From rows to what they say: tables, pictures, and a verdict on each claim about LoRA-Squeeze.

    python -m bench.evidence.report rows.jsonl rates.jsonl --out results

writes tables.md, verdicts.md and the pictures that both show. The same rows give the same bytes, in whatever order
they come.

=============  =======================================================================================================
results        rows of one model and budget, by task, seed, method and rank; what is doubled, what is missing
estimate       means and standard errors over tasks, and when a difference counts
verdicts       the claims, each with its rule, written down before any result was there
verdicts_page  the same as Markdown
tables         the tables, from means to single tasks
rates          learning rates: tried, chosen, used
curves         the pictures
=============  =======================================================================================================

Two rules hold everywhere. Methods are compared on the same tasks and seeds: a mean takes only those that have all
methods and ranks of its table. Seeds are averaged within a task first, and the standard error is that over tasks: it
says how far the mean of other tasks of this kind may lie. With one task alone it is that over seeds.
"""
