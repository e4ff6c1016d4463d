"""The recipes, from their YAML files: student, stages, tokens and what each stage learns."""

from __future__ import annotations

from rnnzoo.conversions.recipes import FOLDER, Recipe, list_recipes
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.stages import Stage

from .text import escape, table

__all__ = ["sections"]


def sections() -> str:
    """A section for every recipe of the package."""
    return "\n\n".join(_section(load_recipe(name)) for name in list_recipes()) + "\n"


def _section(recipe: Recipe) -> str:
    facts = [
        ["student", f"[{recipe.student}](zoo/{recipe.student}.md)" + _options(recipe)],
        ["layers that stay attention (`--keep`)", recipe.keep],
        ["state budget (`--state-budget`)", f"{recipe.state_budget:,} B" if recipe.state_budget else "-"],
        ["training tokens (`--tokens`)", f"{recipe.tokens:,}"],
        ["tokens of a sequence (`--seq-len`)", f"{recipe.seq_len:,}"],
        ["tokens of an optimiser step", f"{recipe.batch_tokens:,}"],
        ["source", escape(recipe.source)],
    ]
    if recipe.progressive:
        facts.insert(2, ["progressive", "1/4, 1/2, 3/4, 7/8 ... of the layers, the stages run at each step"])
    if recipe.stepwise:
        facts.insert(2, ["stepwise", "one layer more at each step: 0, 2, 4 ... before the others"])
    rows = [
        [stage.name, stage.kind, *_cost(recipe, stage), "; ".join(stage.describe(recipe))] for stage in recipe.stages
    ]
    stages = table(["stage", "kind", "share", "tokens", "what is learnt, from what"], rows, "llrrl")
    yaml = (FOLDER / f"{recipe.name}.yaml").read_text()
    return f"""### {recipe.name}

{escape(recipe.description)}

{table(["", ""], facts)}
{stages}
The whole file:

```yaml
{yaml.strip()}
```"""


def _options(recipe: Recipe) -> str:
    said = ", ".join(f"{name}={value}" for name, value in recipe.student_options.items())
    return f" with `{said}`" if said else ""


def _cost(recipe: Recipe, stage: Stage) -> tuple[str, str]:
    if not stage.share:
        return "-", f"{stage.tokens_read(recipe):,} read"
    return f"{stage.share:.0%}", f"{round(stage.share * recipe.tokens):,}"
