"""The page, in Gradio: a prompt, settings, a panel for each model. Nothing of it comes from outside this machine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..kernels.errors import RnnzooError
from . import drawing
from .streaming import Sampling, Snapshot, Speaker, side_by_side

__all__ = ["Answers", "build_page", "expect_free", "import_gradio", "serve"]

REFRESH = 0.08  # seconds between two drawings of the page
# The browser is told to load nothing from elsewhere: no fonts, scripts or pictures that an answer or Gradio may name.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; frame-ancestors 'self'"
EXAMPLES = (
    "Explain in three sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Give me five ideas for a rainy Sunday.",
)


def import_gradio() -> Any:
    """Gradio, with its analytics and version check off.

    Raises:
        RnnzooError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise RnnzooError("The demo needs Gradio, which is not installed: pip install 'rnnzoo[demo]'.") from error
    return gradio


class Answers:
    """What the page's buttons do. Each open page can stop its own question."""

    def __init__(self, speakers: Sequence[Speaker]):
        self.speakers = list(speakers)
        self._stops: dict[str, threading.Event] = {}

    def stop(self, page: str) -> None:
        """Ends what the page `page` is waiting for."""
        if page in self._stops:
            self._stops[page].set()

    def ask(
        self, page: str, prompt: str, sampling: Sampling, system: str = "", chat: bool | None = None
    ) -> Iterator[tuple[Snapshot, ...]]:
        """Snapshots to be drawn: the first, the last, and in between about twelve a second.

        Raises:
            RnnzooError: as `side_by_side`.
        """
        self.stop(page)
        stop = self._stops[page] = threading.Event()
        drawn = 0.0
        try:
            for now in side_by_side(self.speakers, prompt, sampling, system=system, chat=chat, stop=stop.is_set):
                if time.monotonic() - drawn > REFRESH or not any(snapshot.running for snapshot in now):
                    yield now
                    drawn = time.monotonic()
        finally:
            if self._stops.get(page) is stop:
                del self._stops[page]

    def draw(self, now: Sequence[Snapshot | None]) -> list[str]:
        """The panels and the chart as HTML."""
        panels = [drawing.panel(speaker, snapshot) for speaker, snapshot in zip(self.speakers, now, strict=True)]
        return [*panels, drawing.chart(self.speakers, now)]


def build_page(answers: Answers) -> Any:
    """The page as Gradio's Blocks, not served yet."""
    gr = import_gradio()
    speakers = answers.speakers
    chats = all(speaker.has_chat_template for speaker in speakers)
    empty = answers.draw([None] * len(speakers))
    title = f"{speakers[0].name} - rnnzoo"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(drawing.heading(speakers), padding=False)
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="Ask something." if chats else "Write the beginning of a text.",
                lines=2,
                max_lines=5,
                scale=8,
                autofocus=True,
                elem_id="prompt",
            )
            with gr.Column(scale=1, min_width=130):
                run = gr.Button("Run", variant="primary", elem_id="run")
                halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        gr.Examples([[example] for example in EXAMPLES], inputs=prompt, label="For example")
        with gr.Row():
            panels = [gr.HTML(empty[i], elem_id=speaker.role, padding=False) for i, speaker in enumerate(speakers)]
        chart = gr.HTML(empty[-1], elem_id="memory", padding=False)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            settings = _settings(gr, chats)

        def ask(prompt, chat, system, temperature, top_p, top_k, penalty, tokens, seed, request) -> Iterator[list[Any]]:
            try:
                sampling = Sampling(temperature, top_p, _whole(top_k), penalty, _whole(tokens), _whole(seed))
                busy = [gr.Button(interactive=False), gr.Button(interactive=True)]
                for now in answers.ask(request.session_hash or "", prompt, sampling, system, chat):
                    yield [*answers.draw(now), *busy]
                    busy = [gr.skip(), gr.skip()]
            except RnnzooError as error:
                raise gr.Error(str(error), duration=8, print_exception=False) from error

        def stop(request: Any) -> None:
            answers.stop(request.session_hash or "")

        # Gradio looks for its Request among the annotations, and here is no name of it at the top of the file.
        ask.__annotations__["request"] = stop.__annotations__["request"] = gr.Request
        ready = [gr.Button(interactive=True), gr.Button(interactive=False)]
        outputs = [*panels, chart, run, halt]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        asked = gr.on([run.click, prompt.submit], ask, [prompt, *settings], outputs, concurrency_limit=1, **quiet)
        asked.then(lambda: ready, None, [run, halt], queue=False, **quiet)
        halt.click(stop, None, None, queue=False, **quiet)
        page.unload(stop)
    return page


def _settings(gr: Any, chats: bool) -> list[Any]:
    default = Sampling()
    with gr.Row():
        chat = gr.Checkbox(
            chats,
            label="Chat",
            info="The prompt as a user's message, by the chat template; else as a text to go on from.",
            interactive=chats,
        )
        system = gr.Textbox("", label="System message", lines=1, interactive=chats)
    with gr.Row():
        temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature (0: the likeliest token)")
        top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top p")
        top_k = gr.Number(default.top_k, label="Top k (0: no bound)", precision=0, minimum=0)
    with gr.Row():
        penalty = gr.Slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty")
        tokens = gr.Slider(1, 2048, default.max_new_tokens, step=1, label="Most new tokens", elem_id="most")
        seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
    return [chat, system, temperature, top_p, top_k, penalty, tokens, seed]


def _whole(value: float | None) -> int:
    if value is None:
        raise RnnzooError("A setting is empty; give top k, most new tokens and seed as whole numbers.")
    return int(value)


def serve(answers: Answers, *, host: str, port: int | None, browser: bool) -> tuple[Any, str]:
    """Serves the page from threads of this process.

    Args:
        host: the address to listen at. port: None for a free one from 7860 on. browser: open it there.

    Returns:
        Gradio's Blocks, to be closed, and the page's address.

    Raises:
        RnnzooError: Gradio is missing, or the port is taken or not allowed.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    page = build_page(answers)
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=plain, font_mono=["ui-monospace", "Consolas", "monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css=drawing.CSS,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(_LocalOnly)]},
        )
    except OSError as error:
        where = f"port {port}" if port else "any port from 7860 to 7959"
        raise RnnzooError(f"The page cannot be served at {host}, {where}; give another --port or --host.") from error
    return page, address


def expect_free(host: str, port: int | None) -> None:
    """Finds out before any model is loaded that this machine has no such address, or that its port is taken.

    Raises:
        RnnzooError: which of them.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        where = f"{host}, port {port}" if port else host
        raise RnnzooError(f"The page cannot be served at {where} ({reason}); give another --port or --host.") from error


class _LocalOnly:
    """ASGI middleware that adds the policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
