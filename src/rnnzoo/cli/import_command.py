"""`rnnzoo import CHECKPOINT --as ARCH`: other implementations' checkpoints into the zoo."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..kernels.errors import RnnzooError
from .output import Output, output_options


@click.command("import")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option(
    "--as", "architecture", metavar="ARCH", required=True, help="Architecture of the zoo (see `rnnzoo list`)."
)
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), required=True, help="New folder for the model.")
@click.option("--format", metavar="NAME", help="Which implementation wrote it. Default: recognised automatically.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, where CHECKPOINT is a Hub id.")
@output_options
def command(
    checkpoint: str, architecture: str, out: str, format: str | None, revision: str | None, output: Output
) -> None:
    """Convert CHECKPOINT (a folder, a .pth file or a Hub id) to a model of the zoo in DIR.

    No code from the files is executed: safetensors, or torch files read as tensors only. results.json records where the
    weights come from, and README.md is a short card.
    """
    from ..cards.describe import describe
    from ..cards.render import render_card
    from ..conversions.run_folder import write_json
    from ..zoo.core.importing import import_checkpoint
    from .facts import model_facts

    local = _local(checkpoint, revision)
    path = import_checkpoint(local, architecture, out, format=format)
    origin = _origin(checkpoint, Path(local), architecture, format)
    model = describe(path)["model"] | model_facts(path)
    origin |= {"revision": revision} if revision else {}
    record = {"schema": 1, "created": datetime.now(UTC).isoformat(timespec="seconds"), "rnnzoo_version": __version__}
    write_json(path / "results.json", record | {"model": model, "import": origin})
    render_card(path)
    output.result({"model": str(path)}, lambda console: console.print(str(path), markup=False, soft_wrap=True))


def _origin(checkpoint: str, local: Path, architecture: str, format: str | None) -> dict[str, Any]:
    """Where the weights come from: a Hub id and its commit, or a name and a hash; never a path of this machine."""
    from ..conversions.teachers.card import stated_in_card
    from ..conversions.teachers.files import content_hash
    from ..zoo.core.importing import recognised_format

    here = os.path.exists(checkpoint)
    card = stated_in_card(local) if local.is_dir() else {}
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin", "*.pth")
    files = sorted({file for pattern in patterns for file in local.glob(pattern)}) if local.is_dir() else [local]
    return {
        "source": local.resolve().name if here else checkpoint,
        "kind": ("folder" if local.is_dir() else "file") if here else "hub",
        "format": format or recognised_format(local, architecture),
        "sha": content_hash(files) if here else local.name,
        **{key: card[key] for key in ("licence", "licence_name", "citation") if key in card},
    }


def _local(checkpoint: str, revision: str | None) -> str:
    """The path of a checkpoint: itself, or where the Hub's files were put."""
    if os.path.exists(checkpoint):
        return checkpoint
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["README.md", "*.json", "*.safetensors", "*.bin", "*.pth", "tokenizer*", "*.jinja", "*.txt", "*.model"]
    try:
        return snapshot_download(checkpoint, revision=revision, allow_patterns=patterns)
    except HFValidationError as error:
        raise RnnzooError(f"{checkpoint} is neither a folder, a file nor a Hub id like 'owner/name'.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise RnnzooError(f"{checkpoint} is no path here and could not be had from the Hub: {reason}") from error
