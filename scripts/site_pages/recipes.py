"""The recipes, from their YAML files: student, stages, tokens and what each stage learns."""

from __future__ import annotations

from rnnzoo.conversions.recipes import FOLDER, Recipe, list_recipes, load_recipe
from rnnzoo.conversions.recipes.stages import (
    Align,
    Allocate,
    Distilled,
    Dpo,
    EndToEnd,
    Extend,
    Sft,
    Stage,
    TrainedStage,
)

from .text import escape, table

__all__ = ["sections", "stage_words"]

CALIBRATE = "closed form, no training: {text} tokens are read once"
ALLOCATE = "windows move to where they remove the most error in the trained student; {text} tokens are read once"
ALIGN = "each converted layer learns {what} of its teacher layer, from {inputs}{order}; {loss}; trains {who}"
EXTEND = "rows of {length:,} tokens, read {chunk:,} at a time with the state passed on"

TARGETS = {
    "outputs": "the output",
    "heads": "the outputs of the heads",
    "matrices": "the matrix softmax(QK^T)",
}
ALIGN_LOSSES = {
    "relative": "squared error over the target's square",
    "mse": "mean squared error",
    "norm": "norm of the error",
}
ALIGNED = {
    "new": "what is new in the mixers",
    "features": "what is new in the mixers but the decay",
    "mixers": "the mixers",
}
TRAINED = {"mixers": "the mixers", "converted": "the mixers of converted layers", "all": "all parameters"}
STEPS = {
    "each": "",
    "last": "at the last step",
    "up to half": "until half of the layers are converted",
    "from half": "from half of the layers converted on",
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
        facts.insert(2, ["progressive", "1/4, 1/2, 3/4, 7/8 ... of the layers, the stages run at each step"])
    if recipe.stepwise:
        facts.insert(2, ["stepwise", "one layer more at each step: 0, 2, 4 ... before the others"])
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
    if stage.kind in ("calibrate", "allocate"):
        return "-", f"{recipe.calibration_tokens:,} read"
    return f"{stage.share:.0%}", f"{round(stage.share * recipe.tokens):,}"


def stage_words(recipe: Recipe, stage: Stage) -> str:
    """One line about a stage, from its settings."""
    if isinstance(stage, Align):
        words = [_align_words(stage), *_rate_words(stage)]
    elif isinstance(stage, EndToEnd):
        words = [_who(stage), *_end_to_end_words(stage), *_rate_words(stage)]
    elif isinstance(stage, Allocate):
        words = [ALLOCATE.format(text=f"{recipe.calibration_tokens:,}")]
    else:
        words = [CALIBRATE.format(text=f"{recipe.calibration_tokens:,}")]
    return "; ".join(word for word in [*words, STEPS[stage.steps]] if word)


def _align_words(stage: Align) -> str:
    loss = ALIGN_LOSSES[stage.loss] + ("" if stage.weight == 1 else f" x {stage.weight:g}")
    inputs = "the teacher's hidden states" if stage.inputs == "teacher" else "the student's own hidden states"
    order = ", one layer after the other" if stage.order == "sequential" else ""
    what, who = TARGETS[stage.target], ALIGNED[stage.trains]
    return ALIGN.format(what=what, inputs=inputs, order=order, loss=loss, who=who)


def _who(stage: EndToEnd) -> str:
    if stage.trains == "lora":
        targets = ", ".join(stage.lora_targets)
        return f"LoRA of rank {stage.lora_rank} and alpha {stage.lora_alpha:g} on {targets}, end to end"
    return f"{TRAINED[stage.trains]}, end to end"


def _end_to_end_words(stage: EndToEnd) -> list[str]:
    if isinstance(stage, Sft):
        return ["chats of your own" if stage.data is None else f"the chats {stage.data}"]
    if isinstance(stage, Dpo):
        whose = "preferences of your own" if stage.data is None else f"the preferences {stage.data}"
        return [f"DPO on {whose}, beta {stage.beta:g}"]
    assert isinstance(stage, Distilled)
    losses = [f"{stage.kl:g} x KL(teacher, student)"] if stage.kl else []
    if stage.reverse_kl:
        losses.append(f"{stage.reverse_kl:g} x KL(student, teacher)")
    if stage.ce:
        target = "the text" if stage.labels == "text" else "the teacher's likeliest token"
        losses.append(f"{stage.ce:g} x cross-entropy with {target}")
    if stage.z_loss:
        losses.append(f"{stage.z_loss:g} x logsumexp squared")
    rows = [EXTEND.format(length=stage.length, chunk=stage.chunk)] if isinstance(stage, Extend) else []
    return [*rows, " + ".join(losses)]


def _rate_words(stage: TrainedStage) -> list[str]:
    """Learning rates and their course, and window dropout."""
    rates = [f"{stage.lr:g}"] if not isinstance(stage, Align) or stage.trains == "mixers" else []
    if stage.new_lr != stage.lr or not rates:
        rates.append(f"{stage.new_lr:g}" + (" of what is new" if rates else ""))
    for what in ("attention", "rest"):
        if isinstance(stage, EndToEnd) and getattr(stage, f"{what}_lr") is not None:
            rates.append(f"{getattr(stage, f'{what}_lr'):g} of the {'kept ' if what == 'attention' else ''}{what}")
    course = "constant" if stage.schedule == "constant" else f"{stage.schedule} to {stage.min_lr:g}"
    words = [f"learning rate {', '.join(rates)}, {course}"]
    if stage.window_dropout:
        words.append(f"window dropout {stage.window_dropout:g}")
    return words
