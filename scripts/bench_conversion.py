"""The figures of docs/results.md: conversions of one teacher, all on the same text, tokens and seed, then measured.

    python scripts/bench_conversion.py --data PROSE_FOLDER --text TEST.txt --books BOOKS.jsonl.gz --out bench

Runs of `RUNS` that are finished are not run again, so the script can be stopped. Every conversion is measured on --text
(perplexity at 2,048 and 8,192 tokens) beside the teacher and the teacher cut to a window of the same state bytes; the
run named by --full also on recall by distance, decoding by context, tasks, and by position in whole books (--books).
Writes OUT/table.md and OUT/table.json, and OUT/books.md.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import click

# name: (recipe, what else `convert` is told)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnnzoo-4MB": ("rnnzoo", {"state_budget": 4_000_000}),
    "rnnzoo-1.5MB": ("rnnzoo", {"state_budget": 1_500_000}),
    "rnnzoo-4MB-keep-1-4": ("rnnzoo", {"state_budget": 4_000_000, "keep": "1/4"}),
    "rnnzoo-16MB-keep-1-4": ("rnnzoo", {"state_budget": 16_000_000, "keep": "1/4", "seq_len": 4096}),
    "supra": ("supra", {}),
    "mamba-in-llama-keep-1-2": ("mamba-in-llama", {"keep": "1/2"}),
    "mamba-in-llama-keep-1-4": ("mamba-in-llama", {"keep": "1/4"}),
    "mamba-in-llama-keep-none": ("mamba-in-llama", {"keep": "none"}),
    "rnnzoo-4MB-untrained": ("rnnzoo", {"state_budget": 4_000_000, "tokens": 0}),
    "rnnzoo-1.5MB-untrained": ("rnnzoo", {"state_budget": 1_500_000, "tokens": 0}),
}


RECALL = (64, 128, 256, 512)  # distances of the table


@click.command()
@click.option("--teacher", default="embedded", show_default=True)
@click.option("--data", required=True, multiple=True, help="Training text.")
@click.option("--text", required=True, help="Evaluation text, one file (WikiText-2 raw test).")
@click.option("--books", help="JSON lines of whole books, for perplexity by position to 32,768 tokens.")
@click.option("--task", multiple=True, help="LAMBADA- or BLiMP-style files, measured in the --full run.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokens", type=int, default=98_304, show_default=True, help="Training tokens of every run.")
@click.option("--eval-tokens", type=int, default=16_384, show_default=True, help="Tokens of --text measured.")
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="Some of the runs.")
@click.option("--full", default="rnnzoo-4MB", show_default=True, help="The run that gets every measure.")
def main(teacher, data, text, books, task, out, tokens, eval_tokens, only, full):
    """Convert, measure, and write the table."""
    import rnnzoo  # noqa: F401  registers the Auto classes
    from rnnzoo.benchmarks.recipes import figures_of
    from rnnzoo.cli.progress import ProgressReport
    from rnnzoo.conversions.convert import convert
    from rnnzoo.conversions.evaluation import Limits, evaluate

    rows: list[dict[str, Any]] = []
    for name in only or RUNS:
        recipe, options = RUNS[name]
        folder = out / name
        click.echo(f"{name}: converting")
        options = {"tokens": tokens} | options
        done = convert(teacher, recipe, folder, data=list(data), evaluate=False, progress=ProgressReport(), **options)
        click.echo(f"{name}: measuring")
        everything = name == full
        limits = Limits(
            windows=(2048, 8192),
            perplexity_tokens=eval_tokens,
            task_items=400,
            distances=(16, 64, 128, 256, 512, 1024, 2048) if everything else RECALL,
            contexts=(1024, 4096, 16_384, 32_768) if everything else (),
            position_tokens=2048,
            streams=2 if everything else 1,
            sample_tokens=64 if everything else 0,
        )
        files = [text, *(task if everything else ())]
        # The teacher is the same for all and a window of the same bytes is what our budgets are held against.
        columns = ("student", "teacher", "window") if recipe == "rnnzoo" else ("student",)
        results = evaluate(
            folder, teacher=teacher, datasets=files, columns=columns, limits=limits, progress=ProgressReport()
        )
        rows.append({"run": name, **figures_of(results), "minutes": round(done["conversion"]["seconds"] / 60, 1)})
        out.joinpath("table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        out.joinpath("table.md").write_text(_table(rows), encoding="utf-8")
        if everything and books:
            out.joinpath("books.md").write_text(_books(folder, books), encoding="utf-8")
    click.echo(_table(rows))


def _books(folder: Path, books: str) -> str:
    """By position in each book; and the last 4,096 tokens again, read from 4,096 tokens before them.

    Passages differ in difficulty by more than what is looked for, so the second reading is what tells whether a long
    context has worn the state out: the same tokens, one eighth of the context.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rnnzoo.conversions.evaluation.perplexity import by_position

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    opened = gzip.open if books.endswith(".gz") else open
    with opened(books, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    lines = ["| book | tokens 2k to 4k | 28k to 32k | ratio | 28k to 32k, read from 24k on | ratio |", "|" + "---|" * 6]
    logs = []
    with torch.no_grad():
        for record in records:
            ids = tokenizer(record["text"][: 32_768 * 8], add_special_tokens=False).input_ids[:32_768]
            edges = (0, 2048, 4096, 28_672, 32_768)
            long = by_position(model, tokenizer, tokenizer.decode(ids), max_tokens=32_768, edges=edges)
            rest = tokenizer.decode(ids[24_576:])
            again = by_position(model, tokenizer, rest, max_tokens=8192, edges=(0, 4096, 8190))
            early, late, fresh = long[1].perplexity, long[3].perplexity, again[-1].perplexity
            logs.append((math.log(late / early), math.log(late / fresh)))
            lines.append(
                f"| {record.get('title', '-')} | {early:.2f} | {late:.2f} | {late / early:.2f} "
                f"| {fresh:.2f} | {late / fresh:.2f} |"
            )
    means = [math.exp(sum(column) / len(logs)) for column in zip(*logs, strict=True)]
    lines.append(f"| geometric mean | | | {means[0]:.2f} | | {means[1]:.2f} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    head = "run | state MB | tokens | minutes | 2k: student | teacher | window | student / teacher | 8k: student"
    head += " | teacher | window" + "".join(f" | recall at {n}: student | window" for n in RECALL)
    lines = [f"| {head} |", "|" + "---|" * len(head.split("|"))]
    teacher: dict[int, float | None] = dict.fromkeys((2048, 8192))
    for row in rows:
        teacher = {length: row.get(f"ppl_{length}_teacher", before) for length, before in teacher.items()}
        student, known = row.get("ppl_2048_student"), teacher[2048]
        ratio = student / known if student and known else None
        cells = [row["run"], f"{row['state_bytes'] / 1e6:.2f}", f"{row['trained_tokens']:,}", str(row["minutes"])]
        for length in (2048, 8192):
            cells += [_number(row.get(f"ppl_{length}_student")), _number(teacher[length])]
            cells += [_number(row.get(f"ppl_{length}_window"))] + ([_number(ratio)] if length == 2048 else [])
        for distance in RECALL:
            cells += [_number(row.get(f"recall_{distance}_{column}")) for column in ("student", "window")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
