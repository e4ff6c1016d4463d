"""`rnnzoo save DIR OUT`: a copy of a model, with its code on request."""

from __future__ import annotations

import click

from .output import Output, output_options


@click.command("save")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False))
@click.option("--standalone", is_flag=True, help="Add the modelling code, so that the model loads without rnnzoo.")
@output_options
def command(folder: str, out: str, standalone: bool, output: Output) -> None:
    """Copy the model in DIR into the new folder OUT: weights, configuration, tokenizer, card and results.

    With --standalone, OUT also holds the modules of rnnzoo that the model needs (modeling_rnnzoo.py names them), and
    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) needs torch, transformers and safetensors alone.
    """
    from ..publish.saving import save_model

    path = save_model(folder, out, standalone=standalone)
    output.result({"model": str(path)}, lambda console: console.print(str(path), markup=False, soft_wrap=True))
