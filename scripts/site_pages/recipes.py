"""The recipes, from their YAML files: student, stages, tokens and what each stage learns."""

from __future__ import annotations

from rnnzoo.conversions.recipes import FOLDER, Recipe, list_recipes, load_recipe
from rnnzoo.conversions.recipes.stages import Stage

from .text import escape, table

__all__ = ["sections", "stage_words"]

KINDS = {
    "calibrate": "closed form, no training: {text} tokens are read once",
    "align": "each mixer learns its teacher layer's output from that layer's own inputs",
    "train": "end to end",
}


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
        facts.insert(2, ["progressive", "1/2, 3/4, 7/8 ... of the layers, the stages run at each step"])
    rows = [[stage.name, stage.kind, *_cost(recipe, stage), stage_words(recipe, stage)] for stage in recipe.stages]
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
    if stage.kind == "calibrate":
        return "-", f"{recipe.calibration_tokens:,} read"
    return f"{stage.share:.0%}", f"{round(stage.share * recipe.tokens):,}"


def stage_words(recipe: Recipe, stage: Stage) -> str:
    """One line about a stage, from its settings."""
    if stage.kind == "calibrate":
        return KINDS["calibrate"].format(text=f"{recipe.calibration_tokens:,}")
    if stage.kind == "align":
        return f"{KINDS['align']}; learning rate {stage.new_lr:g}"
    losses = []
    if stage.kl:
        losses.append(f"{stage.kl:g} x KL(teacher, student)")
    if stage.ce:
        target = "the text" if stage.labels == "text" else "the teacher's likeliest token"
        losses.append(f"{stage.ce:g} x cross-entropy with {target}")
    if stage.z_loss:
        losses.append(f"{stage.z_loss:g} x logsumexp squared")
    who = "the mixers" if stage.trains == "mixers" else "all parameters"
    rates = f"learning rate {stage.lr:g}" + ("" if stage.lr == stage.new_lr else f", {stage.new_lr:g} of what is new")
    return f"{who}, {KINDS['train']}; {' + '.join(losses)}; {rates}"
