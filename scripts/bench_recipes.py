"""Recipes against each other, on identical text, tokens and seed. Hours to days on two cores; what is stopped goes on.

    python scripts/bench_recipes.py table --data PROSE --text TEST.txt --task LAMBADA --task BLIMP --out recipes
    python scripts/bench_recipes.py frontier --data PROSE --text TEST.txt --out recipes
    python scripts/bench_recipes.py kills --out kills

table     recipe x training tokens x layers kept: perplexity, tasks, recall, minutes
frontier  quality against state bytes: ours at many budgets, the teacher in a window of the same bytes, TOVA
kills     a tiny random teacher by every recipe; each run is killed at random moments and must end at the same weights

What is finished in OUT is not done again. `table` writes OUT/recipes.md and .json; `frontier` writes OUT/frontier.md,
.json and .png, with the recipes that `table` has measured among the points.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import click

from rnnzoo.cli.progress import ProgressReport
from rnnzoo.cli.quantities import BYTES, COUNT, COUNT_OR_NONE
from rnnzoo.kernels.files import replace_text

TOKENS = (0, 50_000, 250_000, 1_000_000)
BUDGETS = tuple(int(mb * 1e6) for mb in (0.5, 1, 1.5, 2, 4, 8, 16, 32))


def shared(function: Any) -> Any:
    """Options of the parts that convert the real teacher."""
    for option in (
        click.option("--out", default="recipes", show_default=True, type=click.Path(file_okay=False, path_type=Path)),
        click.option("--eval-tokens", type=COUNT, default=16_384, show_default=True, help="Of --text."),
        click.option("--text", required=True, type=click.Path(exists=True), help="Evaluation text."),
        click.option("--data", required=True, multiple=True, help="Training text."),
        click.option("--teacher", default="embedded", show_default=True),
    ):
        function = option(function)
    return function


@click.group()
def main() -> None:
    """See the head of the file."""


@main.command("table")
@shared
@click.option("--task", "tasks", multiple=True, type=click.Path(exists=True), help="LAMBADA- or BLiMP-style file.")
@click.option("--items", type=click.IntRange(min=1), default=400, show_default=True, help="Of each task.")
@click.option("--recipe", "recipes", multiple=True, help="Repeatable. Default: all.")
@click.option("--tokens", "counts", multiple=True, type=COUNT_OR_NONE, help=f"Repeatable. Default: {TOKENS}.")
@click.option("--keep", "keeps", multiple=True, help="Repeatable. Default: none and 1/4.")
@click.option("--student", default="gated_delta_net", show_default=True, help="Purely recurrent student of ours.")
def table_command(teacher, data, text, eval_tokens, out, tasks, items, recipes, counts, keeps, student) -> None:
    """Recipe x tokens x layers kept."""
    from rnnzoo.benchmarks.recipes import grid, measure, recipe_table
    from rnnzoo.conversions.evaluation.texts import load_all

    names = [dataset.name for dataset in load_all(tasks)]
    rows = []
    for run in grid(recipes, counts or TOKENS, keeps or ("none", "1/4"), student):
        click.echo(run.name, err=True)
        settings = {"teacher": teacher, "data": data, "files": [text, *tasks], "eval_tokens": eval_tokens}
        columns = ("student", "teacher") if not rows else ("student",)  # the teacher is the same in all
        with ProgressReport() as progress:
            row = measure(run, out / run.name, **settings, columns=columns, items=items, progress=progress)
        rows.append(row)
        replace_text(out / "recipes.json", json.dumps({"tasks": names, "rows": rows}, indent=1) + "\n")
        replace_text(out / "recipes.md", recipe_table(rows, names))
    click.echo(recipe_table(rows, names))


@main.command("frontier")
@shared
@click.option(
    "--tokens", type=COUNT_OR_NONE, default=98_304, show_default=True, help="Training tokens of each of ours."
)
@click.option("--budget", "budgets", multiple=True, type=BYTES, help="Repeatable. Default: 0.5 to 32 MB.")
def frontier_command(teacher, data, text, eval_tokens, out, tokens, budgets) -> None:
    """Quality against bytes of state."""
    from rnnzoo.benchmarks.frontier import PANELS, draw, frontier_rows, frontier_table
    from rnnzoo.benchmarks.recipes import Run, bounded_cache, measure
    from rnnzoo.conversions.teachers import resolve_teacher

    found = resolve_teacher(teacher)
    table = out / "recipes.json"
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.is_file() else []
    rows = [row for row in rows if not row["run"].startswith("rnnzoo") and row["keep"] == "none"]
    settings = {"teacher": teacher, "data": data, "files": [text], "eval_tokens": eval_tokens, "windows": (2048, 8192)}
    for budget in budgets or BUDGETS:
        label = f"rnnzoo-{budget / 1e6:g}MB"
        ours = Run(label, "rnnzoo", {"state_budget": budget, "tokens": tokens, "keep": "none"})
        for run, columns in (
            (ours, ("student", "teacher", "window")),
            (bounded_cache(found, budget, out / "recipes"), ("student",)),
        ):
            click.echo(run.name, err=True)
            with ProgressReport() as progress:
                rows.append(measure(run, out / run.name, **settings, columns=columns, progress=progress))
        whole = {key: next((r[f"{key}_teacher"] for r in rows if f"{key}_teacher" in r), None) for _, key in PANELS}
        points = frontier_rows(rows)
        replace_text(out / "frontier.json", json.dumps({"rows": points, "teacher": whole}, indent=1) + "\n")
        replace_text(out / "frontier.md", frontier_table(points, whole))
        try:
            draw(points, whole, out / "frontier.png")
        except ImportError:
            click.echo("no plot: matplotlib is not installed (pip install 'rnnzoo[plots]')", err=True)
    click.echo(frontier_table(points, whole))


@main.command("kills")
@click.option("--out", default="kills", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--number", type=click.IntRange(min=1), default=20, show_default=True, help="Kills in all.")
@click.option("--recipe", "recipes", multiple=True, help="Repeatable. Default: all.")
@click.option("--seed", type=int, default=0, show_default=True)
def kills_command(out, number, recipes, seed) -> None:
    """Runs killed at random moments end where undisturbed ones do."""
    from rnnzoo.benchmarks.kills import kill_and_compare, tiny_setting
    from rnnzoo.conversions.recipes import list_recipes

    setting = tiny_setting(out)
    names = list(recipes or list_recipes())
    chance = random.Random(seed)
    shares = [number // len(names) + (i < number % len(names)) for i in range(len(names))]
    different = 0
    for name, share in zip(names, shares, strict=True):
        for i, outcome in enumerate(kill_and_compare(setting, name, share, out / name, chance)):
            click.echo(f"{name}, kill {i + 1}: after {outcome.seconds:.1f} s, {outcome.words}")
            different += not outcome.same
    click.echo(f"{number} kills, {number - different} identical ends")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
