"""`rnnzoo push DIR REPO`: upload a model to the Hub in one commit; an interrupted upload resumes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..kernels.errors import RnnzooError
from ..kernels.files import replace_text
from .output import Output, output_options
from .quantities import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ..cards.published import PublishedFile


@click.command("push")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Create a private repository; an existing public one is refused.")
@click.option("--branch", "--revision", default="main", show_default=True, help="Created if it does not exist.")
@click.option("--tag", help="A tag for the commit, such as v1.0.")
@click.option("--pr", "pull_request", is_flag=True, help="Propose the commit as a pull request.")
@click.option("--message", help="Commit message. Default: Upload with rnnzoo VERSION.")
@click.option(
    "--code/--no-code",
    default=True,
    show_default=True,
    help="Add the modelling code, so that the model loads without rnnzoo (trust_remote_code=True).",
)
@click.option(
    "--i-have-permission",
    "permission",
    is_flag=True,
    help="The teacher's owner has permitted publishing although its licence forbids derivatives; the card mentions it.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the files to upload and their sizes; uses no network, writes nothing."
)
@output_options
def command(
    folder: str, repo: str, code: bool, permission: bool, dry_run: bool, output: Output, **options: Any
) -> None:
    """Upload the model in DIR to the Hub repository REPO (owner/name), which is created if it does not exist.

    Weights, configuration, tokenizer, card, plots, results, recipe and modelling code are uploaded in one commit. Files
    that are already there are not sent again, also after an interrupted upload. Log in with `hf auth login`, or set
    HF_TOKEN; HF_ENDPOINT and HF_HUB_DISABLE_PROGRESS_BARS work as in the Hub's own tools.
    """
    if options["pull_request"] and options["tag"]:
        raise click.UsageError("A tag needs a commit on a branch: --tag does not go with --pr.")
    files, left = _prepare(folder, permission, dry_run, output)
    if code:
        files = _with_code(Path(folder), files)
    if dry_run:
        _show_plan(files, left, repo, output)
        return
    from ..cards.hub import push_files

    with _quiet_hub(output):
        pushed = push_files(files, repo, **options, note=output.note)
    output.result(dataclasses.asdict(pushed), lambda console: _show(pushed, files, console))


def _prepare(folder: str, permission: bool, dry_run: bool, output: Output) -> tuple[list[PublishedFile], list[str]]:
    """Checks licence, weights and card; without --dry-run, writes the permission down and the card where it lacks."""
    from ..cards.licences import may_publish
    from ..cards.published import local_paths, published_files, read_results
    from ..cards.render import render_card

    published_files(folder)  # a folder that is no model must be told before its licence
    results = read_results(folder)
    permitted = may_publish(results, permission)
    if results is None:
        output.note(f"{folder} has no results.json: its teacher's licence is not known here; check it yourself")
    elif not dry_run:
        recorded = (results.get("publish") or {}).get("permission") is True
        if permitted and not recorded:
            _record_permission(Path(folder), results)
        if (permitted and not recorded) or not (Path(folder) / "README.md").is_file():
            render_card(folder)
    if not (Path(folder) / "README.md").is_file():
        output.note(f"{folder} has no README.md: there will be no model card")
    elif results is not None:
        _check_card(Path(folder), output)
    if named := local_paths(folder):
        output.note(f"results.json names paths of this machine, which will be public: {', '.join(named[:3])}")
    return published_files(folder)


def _with_code(folder: Path, files: list[PublishedFile]) -> list[PublishedFile]:
    """With the code of a model of the zoo and the `auto_map` that names it; other models, or with code, as they are.

    The card says how the model loads, so it is rendered again with the code there, unless somebody wrote in it where it
    would be overwritten. DIR itself stays as it is.
    """
    from ..kernels.files import object_or_nothing

    config = object_or_nothing(folder / "config.json")
    if not str(config.get("model_type")).startswith("rnnzoo-") or config.get("auto_map"):
        return files
    from ..cards.published import with_contents
    from ..publish.standalone import standalone_files

    made = standalone_files(folder)
    return with_contents(files, made | _card_with_code(files, made))


def _card_with_code(files: list[PublishedFile], made: dict[str, bytes]) -> dict[str, bytes]:
    """README.md for a folder with these additional files; nothing where it is not the rendered one."""
    import tempfile

    from ..cards.render import render_card

    small = [file for file in files if not file.lfs]
    if not {"README.md", "results.json"} <= {file.path for file in small}:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for file in small:
            (copy / file.path).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.path).write_bytes(file.source if isinstance(file.source, bytes) else file.source.read_bytes())
        before = (copy / "README.md").read_bytes()
        if render_card(copy).read_bytes() != before:
            return {}
        for name, content in made.items():
            (copy / name).write_bytes(content)
        return {"README.md": render_card(copy).read_bytes()}


def _record_permission(folder: Path, results: dict[str, Any]) -> None:
    import json

    results["publish"] = (results.get("publish") or {}) | {"permission": True}
    try:
        replace_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RnnzooError(f"Cannot write results.json in {folder}: {error.strerror or error}.") from None


def _check_card(folder: Path, output: Output) -> None:
    """What the Hub reads must be valid; what people read may be written by hand."""
    from ..cards.validate import validate_card, validate_metadata

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RnnzooError(f"{folder / 'README.md'} cannot be read: {error}.") from None
    for problem in validate_card(text, folder)[:3]:
        output.note(f"README.md: {problem}")
    if problems := validate_metadata(text):
        raise RnnzooError(
            f"The card of {folder} is not valid: {problems[0]} `rnnzoo card {folder}` writes it again from "
            "results.json."
        )


@contextlib.contextmanager
def _quiet_hub(output: Output) -> Iterator[None]:
    """huggingface_hub's warnings of a retry are notes: with --quiet they go nowhere."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    if output.quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _show_plan(files: list[PublishedFile], left: list[str], repo: str, output: Output) -> None:
    value = {
        "repo": repo,
        "files": [{"path": file.path, "size": file.size, "lfs": file.lfs} for file in files],
        "bytes": sum(file.size for file in files),
        "left_out": left,
    }

    def show(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for file in files:
            table.add_row(Text(file.path), Text(format_bytes(file.size), justify="right"), "LFS" if file.lfs else "")
        console.print(table)
        console.print(Text(f"{len(files)} files, {format_bytes(value['bytes'])}, to {repo}; nothing was sent"))
        if left:
            console.print(Text(f"left out: {', '.join(left)}"))

    output.result(value, show)


def _show(pushed: Any, files: list[PublishedFile], console: Console) -> None:
    from rich.text import Text

    lines = []
    if pushed.created:
        lines.append(f"made the repository {pushed.repo}")
    if not pushed.uploaded and not pushed.deleted:
        lines.append(f"nothing to do: all {pushed.unchanged} files are there, at commit {pushed.commit[:8]}")
    else:
        size = sum(file.size for file in files if file.path in pushed.uploaded)
        same = f"; {pushed.unchanged} unchanged" if pushed.unchanged else ""
        lines.append(f"{len(pushed.uploaded)} files, {format_bytes(size)}, as commit {pushed.commit[:8]}{same}")
    if pushed.deleted:
        lines.append(f"no longer there: {', '.join(pushed.deleted)}")
    if pushed.tag:
        lines.append(f"tag {pushed.tag}")
    for line in [*lines, pushed.pull_request or pushed.url]:
        console.print(Text(line), soft_wrap=True)
