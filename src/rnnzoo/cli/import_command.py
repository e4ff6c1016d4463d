"""`rnnzoo import CHECKPOINT --as ARCH`: other implementations' checkpoints into the zoo."""

from __future__ import annotations

import os

import click

from ..kernels.errors import RnnzooError
from .output import Output, output_options


@click.command("import")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option(
    "--as", "architecture", metavar="ARCH", required=True, help="Architecture of the zoo (see `rnnzoo list`)."
)
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), required=True, help="New folder for the model.")
@click.option("--format", metavar="NAME", help="Which implementation wrote it; recognised if not given.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, where CHECKPOINT is a Hub id.")
@output_options
def command(
    checkpoint: str, architecture: str, out: str, format: str | None, revision: str | None, output: Output
) -> None:
    """Write CHECKPOINT, a folder, a .pth file or a Hub id, as a model of the zoo into DIR.

    Nothing that a file holds is run: safetensors, or torch files read as tensors alone.
    """
    from ..zoo.core.importing import import_checkpoint

    path = import_checkpoint(_local(checkpoint, revision), architecture, out, format=format)
    output.result({"model": str(path)}, lambda console: console.print(str(path), markup=False, soft_wrap=True))


def _local(checkpoint: str, revision: str | None) -> str:
    """The path of a checkpoint: itself, or where the Hub's files were put."""
    if os.path.exists(checkpoint):
        return checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.pth", "tokenizer*", "*.jinja", "*.txt", "*.model"]
    try:
        return snapshot_download(checkpoint, revision=revision, allow_patterns=patterns)
    except HFValidationError as error:
        raise RnnzooError(f"{checkpoint} is neither a folder, a file nor a Hub id like 'owner/name'.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise RnnzooError(f"{checkpoint} is no path here and could not be had from the Hub: {reason}") from error
