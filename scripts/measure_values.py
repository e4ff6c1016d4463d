"""What refitted values bring to purely recurrent students without training: perplexity with the part and without it.

    python scripts/measure_values.py --data PROSE --text TEST.txt --out values.json

The same calibration text for all; perplexity on the first --eval-tokens of --text in windows of --seq-len, float32.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import click
import torch

from rnnzoo.conversions.data import open_corpus, pack
from rnnzoo.conversions.evaluation.texts import load
from rnnzoo.conversions.fit.closed_form import ClosedForm, Stream
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.calibrate import fit_layers, loss_behind
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher

PARTS = {"without": ("decay", "scale", "output"), "with": ("decay", "values", "scale", "output")}


@torch.no_grad()
def loss_on(model, data) -> float:
    """Mean cross-entropy per token of rows of text, in nats."""
    rows = [data[i] for i in range(len(data))]
    streams = [Stream.of(model, row) for row in rows]
    for block in model.model.layers:
        for stream in streams:
            stream.advance(block)
    return loss_behind(model, streams, rows, False)


@click.command()
@click.option("--teacher", "name", default="embedded", show_default=True)
@click.option("--student", "students", multiple=True, default=("gated_delta_net", "gla"), show_default=True)
@click.option("--data", required=True, multiple=True, help="Calibration text.")
@click.option("--text", required=True, help="Evaluation text, one file.")
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--tokens", type=int, default=4096, show_default=True, help="Of calibration text.")
@click.option("--eval-tokens", type=int, default=8192, show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(name, students, data, text, seq_len, tokens, eval_tokens, out) -> None:
    """Fit, measure and write."""
    teacher = resolve_teacher(name)
    tokenizer, model = teacher.tokenizer(), teacher.load(torch.float32)
    teacher_model = zoo_teacher(teacher, model, torch.float32)
    corpus = open_corpus(list(data), "text", tokenizer=tokenizer)
    documents = corpus.documents("calibration", seed=0)
    rows = pack(documents, tokenizer, seq_len, tokens, name="calibration", source="", long_documents=True)
    held = pack([load(text).text], tokenizer, seq_len, eval_tokens, name="test", source="", long_documents=True)
    found = {"teacher": math.exp(loss_on(teacher_model, held)), "tokens": rows.num_tokens, "held_out": held.num_tokens}
    click.echo(json.dumps(found))
    for mixer in students:
        for what, parts in PARTS.items():
            started = time.process_time()
            recipe = Recipe("values", mixer, [])
            config = student_config(teacher, recipe, layer_types(teacher, recipe, []))
            student = build_student(teacher, model, config, mixer, torch.float32, 0).eval()
            layers = InMemoryLayers(teacher_model, student)
            fit_layers(layers, rows, ClosedForm(parts))
            errors = [layer["after"] for layer in layers.reports()]
            seconds = time.process_time() - started
            found[f"{mixer}, {what}"] = {
                "perplexity": math.exp(loss_on(student, held)),
                "error": sum(errors) / len(errors),
                "cpu_seconds": round(seconds),
            }
            click.echo(json.dumps({f"{mixer}, {what}": found[f"{mixer}, {what}"]}))
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
