"""`rnnzoo demo DIR`: a local web page where a model answers next to its teacher."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .conversion_options import loading_options
from .output import Output, output_options

if TYPE_CHECKING:
    from ..demo.streaming import Speaker


@click.command("demo")
@click.argument("folder", metavar="DIR")
@click.option("--teacher", help="Model to compare with: a Hub id, a folder, a GGUF file, or `embedded`. Default: none.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 means the whole network."
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the first free port from 7860 on.")
@click.option("--no-browser", is_flag=True, help="Do not open the page in a browser.")
@loading_options
@output_options
def command(
    folder: str, teacher: str | None, host: str, port: int | None, no_browser: bool, output: Output, **source: Any
) -> None:
    """Serve a local web page where the model in DIR answers, with live tokens/s and memory; Ctrl-C ends it.

    With --teacher the two answer the same prompt side by side. The page loads nothing from the network and is not
    shared. Needs the extra `demo` (Gradio).
    """
    from ..demo.page import Answers, expect_free, import_gradio, serve

    # Before minutes are spent on loading.
    import_gradio()
    expect_free(host, port)
    with output.only_result_on_stdout():
        speakers = _speakers(folder, teacher, source, output)
        page, address = serve(Answers(speakers), host=host, port=port, browser=not no_browser)
    result = {"address": address, "models": {speaker.role: speaker.name for speaker in speakers}}
    output.result(result, lambda console: console.print(f"The demo is at {address} (Ctrl-C ends it)"))
    if host not in ("127.0.0.1", "localhost", "::1"):
        output.note(f"Whoever reaches {host} can use it: there is no password.")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _speakers(folder: str, teacher: str | None, source: dict[str, Any], output: Output) -> list[Speaker]:
    from ..conversions.teachers import resolve_teacher
    from ..demo.streaming import Speaker
    from .generate_command import load

    reference = resolve_teacher(teacher) if teacher is not None else None  # found out before the student is loaded
    output.note(f"loading {folder}")
    model, tokenizer = load(folder, **source)
    name = Path(folder).resolve().name if Path(folder).exists() else folder
    speakers = [Speaker(name, "student", model, tokenizer)]
    if reference is not None:
        output.note(f"loading {reference.name}")
        other: Any = reference.load(dtype=model.dtype)
        speakers.append(Speaker(reference.name, "teacher", other.to(model.device).eval(), reference.tokenizer()))
    return speakers
