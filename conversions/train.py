"""`train`: an architecture of the zoo learns text from nothing, through transformers' Trainer.

The text is packed into rows of `context` tokens; a document never sees the one before it in its row. Killed at any
moment and called again with the same arguments, a run ends at the same weights. Under torchrun every process calls
`train`; the first of them writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from .byte_tokenizer import byte_tokenizer
from .data import open_corpus
from .energy import check_energy, measured_energy
from .from_scratch import Progress, TrainingFromScratch
from .processes import Processes
from .run_folder import FINISHED, alone_in, join_run, open_run
from .teachers.files import hub_reachable, user_errors
from .train_config import TrainSettings, architecture_of, new_config

__all__ = ["TrainSettings", "train"]


def train(
    out: str | Path,
    data: list[str],
    *,
    arch: str | None = None,
    config: str | Path | None = None,
    size: str | None = None,
    fields: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    text_field: str = "text",
    eval_data: list[str] | None = None,
    settings: TrainSettings | None = None,
    restart: bool = False,
    evaluate: bool = True,
    energy: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a model from scratch; the same call goes on where a stopped one was.

    Args:
        out: folder of the result. data: as `open_corpus` takes it; eval_data: held-out text instead of a share of it.
        arch, config, size, fields: as `new_config` takes them.
        tokenizer: folder or Hub id; None: bytes.
        restart: discard an earlier run in `out`. evaluate: measure the result on the held-out text, as `convert` does.
        energy: ISO code of the country, such as "DEU": measure energy and CO2 of the training with CodeCarbon.
        progress: called as progress(stage, done tokens, all tokens, info).
    Returns:
        The contents of results.json.
    Raises:
        RnnzooError: bad input, as one sentence.
    """
    settings = settings or TrainSettings()
    check_energy(energy)
    words = _tokenizer(tokenizer)
    fields = dict(fields or {})
    fields.setdefault("max_position_embeddings", max(2048, settings.context))
    made = new_config(arch, config, size, fields, words)
    corpus = open_corpus(data, text_field, tokenizer=words)
    endless = settings.tokens is None and settings.steps is None
    if endless and not all(Path(name).expanduser().exists() for name in data):
        raise RnnzooError("A data set of the Hub is streamed and has no end here; say how many tokens or steps.")
    held_out = open_corpus(eval_data, text_field, tokenizer=words) if eval_data else None
    request = {
        "architecture": architecture_of(made),
        "config": made.to_diff_dict(),
        "data": data,
        "eval_data": eval_data,
        "text_field": text_field,
        "tokenizer": tokenizer,
        "settings": dataclasses.asdict(settings),
    }
    processes = Processes()
    main = processes.main
    stopped = f"The training in {out} stopped, and the same command will go on with it"
    with contextlib.ExitStack() as stack:

        def prepared() -> TrainingFromScratch:
            if main:
                stack.enter_context(alone_in(out))
            run = open_run(out, request, restart) if main else join_run(out)
            if run.created:
                stack.enter_context(alone_in(out))
            report = (main and progress) or (lambda *_: None)
            job = TrainingFromScratch(run, made, words, corpus, held_out, settings, processes, report)
            try:
                with user_errors(stopped):
                    job.prepare()
            except RnnzooError:
                run.discard()
                raise
            if main:
                run.begin()
            return job

        job = processes.first(prepared)
        with user_errors(stopped):
            if job.run.record(FINISHED) is None:
                with measured_energy(energy if main else None, job.run.folder):
                    job.train()
            return processes.only(lambda: job.results(evaluate)) or {}


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    there = Path(name).expanduser().is_dir()
    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=there or not hub_reachable(), trust_remote_code=False
        )
    except Exception as error:  # the Hub and every kind of tokenizer have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RnnzooError(f"{name} holds no tokenizer, as a folder or on the Hub: {reason}") from error
