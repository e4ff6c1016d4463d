"""The folder of a run: what was asked for, which stages are finished, and the student after the last of them.

    OUT/.rnnzoo/run.json            the request, and a record of each finished stage
    OUT/.rnnzoo/student/            the student after the last finished stage, in float32
    OUT/.rnnzoo/ranking.json        how much each layer matters, where `keep` is "best ..."
    OUT/.rnnzoo/<stage>/            checkpoints and metrics of a training stage
    OUT/.rnnzoo-earlier/            what a restart replaces, until the new run has begun
    OUT/                            the finished model

Everything is written under a temporary name and renamed, so that a killed run finds only whole things. A failure
deletes what the failing call has made, never what was there before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from ..kernels.files import replace_text

__all__ = ["FINISHED", "GENERATION", "RANKING", "Run", "alone_in", "holds_run", "join_run", "open_run", "write_json"]

FINISHED = "finished"  # the last record of a run: the model is in OUT
RANKING = "ranking.json"  # of the layers, where the recipe keeps the best
FOLDER = ".rnnzoo"
EARLIER = ".rnnzoo-earlier"
GENERATION = "generation_config.json"
PUBLISHED = ("config.json", GENERATION, "results.json", "evaluation.json", "README.md")


class Run:
    """An opened run; `open_run` makes them.

    Attributes:
        new: this call opened it, and it has not begun. created: that call made the folder OUT as well.
    """

    def __init__(self, out: Path, request: dict[str, Any], stages: list[dict[str, Any]]):
        self.out, self.request, self.stages = out, request, stages
        self.new = self.created = False
        self.folder = out / FOLDER

    def record(self, name: str) -> dict[str, Any] | None:
        """What a finished stage reported; None: it is not finished."""
        return next((stage for stage in self.stages if stage["name"] == name), None)

    def finish(self, name: str, student: Any, report: dict[str, Any]) -> None:
        """Keeps the student and the report of a stage, then forgets its checkpoints and the teacher's predictions."""
        if student is not None:
            number = len(self.stages)
            folder = self.folder / f"student-{number}"
            _save_model(student, folder)
            report = report | {"student": folder.name}
        self.stages.append({"name": name} | report)
        self.save()
        self.begin()
        for old in self.folder.glob("student-*"):
            if name == FINISHED or (student is not None and old.name != report["student"]):
                shutil.rmtree(old, ignore_errors=True)
        for used in [*(self.folder / name).glob("checkpoint-*"), self.folder / name / "teacher"]:
            shutil.rmtree(used, ignore_errors=True)

    def student_folder(self) -> Path | None:
        """The student after the last stage that changed it."""
        names = [stage["student"] for stage in self.stages if "student" in stage]
        return self.folder / names[-1] if names else None

    def read_again(self) -> None:
        """Takes in what another process of this run has recorded."""
        self.stages[:] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["stages"]

    def save(self) -> None:
        write_json(self.folder / "run.json", {"request": self.request, "stages": self.stages})

    def begin(self) -> None:
        """From here on the run is there to be gone on with; the one that it replaces goes."""
        self.new = False
        if (self.out / EARLIER).exists():
            os.replace(self.out / EARLIER, self.folder / "replaced")  # at once: half of it is not to come back
        shutil.rmtree(self.folder / "replaced", ignore_errors=True)

    def discard(self) -> None:
        """Leaves no trace of a new run that could not begin: OUT is again what it was before this call."""
        if not self.new:
            return
        if (self.out / EARLIER).exists():
            _bring_back(self.out)
        elif [entry.name for entry in self.out.iterdir()] == [FOLDER]:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.created:
                self.out.rmdir()

    def publish(self, student: Any, tokenizer: Any, generation: dict[str, Any] | None = None) -> None:
        """The finished model into OUT, and its settings of generation, where it has others than its configuration."""
        whole = self.folder / "model"
        _save_model(student, whole, tokenizer)
        if generation is not None:
            write_json(whole / GENERATION, generation)
        self.publish_folder(whole)

    def publish_folder(self, whole: Path) -> None:
        """The same of a model that has been saved to this folder of the run, which goes."""
        for old in self.out.glob("model*.safetensors*"):
            old.unlink()
        for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, self.out / file.name)
        whole.rmdir()


def _save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1) + "\n")


def holds_run(out: str | os.PathLike) -> bool:
    """Whether a run was begun in `out`."""
    return (Path(out) / FOLDER / "run.json").is_file()


@contextlib.contextmanager
def alone_in(out: str | os.PathLike) -> Iterator[None]:
    """Holds the folder `out`, where it exists, for this process; a lock of the system's, gone when the process is.

    Raises:
        RnnzooError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX: no locks of folders
        yield
        return
    if not Path(out).is_dir():
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise RnnzooError(f"Another process is at work in {out}; let it end, or choose another folder.") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def open_run(out: str | os.PathLike, request: dict[str, Any], restart: bool) -> Run:
    """The run in `out`, new or to be continued.

    Raises:
        RnnzooError: the folder holds something else, or a run with another request, or cannot be written.
    """
    out = Path(out)
    # As JSON stores it, so that a stored request and a new one compare.
    request = json.loads(json.dumps(request))
    try:
        state = out / FOLDER / "run.json"
        if out.exists() and not out.is_dir():
            raise RnnzooError(f"{out} is a file; give --out a folder.")
        if (out / EARLIER).is_dir():  # a restart was stopped before its run had begun
            asked_for = _request(out / FOLDER, request) != request == _request(out / EARLIER, request)
            if restart or asked_for or not state.is_file():
                _bring_back(out)
        if out.is_dir() and any(out.iterdir()) and not state.is_file():
            left = [entry.name for entry in out.iterdir()]
            if left != [FOLDER]:
                raise RnnzooError(f"{out} holds something else ({sorted(left)[0]}); choose another or an empty folder.")
        if restart or not state.is_file():
            return _new_run(out, request)
        before, stages = _stored(out / FOLDER, request)
    except OSError as error:
        raise RnnzooError(f"{out} cannot be used: {error.strerror or error}; choose another folder.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RnnzooError(f"{state} is damaged; run again with --restart.") from error
    if any(stage["name"] == FINISHED for stage in stages) and "offload" in before:
        before["offload"] = request.get("offload")  # there is nothing left to do
    if before.get("offload", request.get("offload")) != request.get("offload"):
        how = "with" if before["offload"] else "without"
        raise RnnzooError(
            f"{out} holds a run that was begun {how} --offload; go on {how} it, choose another folder, or discard it "
            "with --restart."
        )
    if differences := _differences(before, request):
        shown = "; ".join(differences[:4])
        raise RnnzooError(
            f"{out} holds a run with other settings ({shown}); repeat its settings to go on, choose another folder, or "
            "discard it with --restart."
        )
    return Run(out, request, stages)


def join_run(out: str | os.PathLike) -> Run:
    """The run in `out` that another process of this call has opened."""
    state = json.loads((Path(out) / FOLDER / "run.json").read_text(encoding="utf-8"))
    return Run(Path(out), state["request"], state["stages"])


def _new_run(out: Path, request: dict[str, Any]) -> Run:
    """A run from the beginning, beside an earlier one that comes back unless this one begins."""
    created = not out.exists()
    if holds_run(out):
        os.replace(out / FOLDER, out / EARLIER)
        published = out / EARLIER / "published"
        published.mkdir(exist_ok=True)
        for name in PUBLISHED:
            if (out / name).is_file():
                os.replace(out / name, published / name)
        for file in out.glob("model*.safetensors*"):
            os.replace(file, published / file.name)
    run = Run(out, request, [])
    run.new, run.created = True, created
    shutil.rmtree(run.folder, ignore_errors=True)  # pieces without a run
    run.folder.mkdir(parents=True)
    run.save()
    return run


def _stored(folder: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The request and the stages of the run in this folder; what requests did not say in earlier versions is filled in.

    Args:
        asked: the new request.
    """
    stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    request, stages = dict(stored["request"]), list(stored["stages"])
    if request and "offload" in asked and "offload" not in request:
        # A run with --offload keeps layers in place of a student; one that has kept neither may become either.
        layers = (folder / "layers").is_dir()
        kept = layers or bool(stages)
        request["offload"] = layers or "student" not in stages[0] if kept else asked["offload"]
    return request, stages


def _request(folder: Path, asked: dict[str, Any]) -> Any:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _stored(folder, asked)[0]
    return None


def _bring_back(out: Path) -> None:
    """Undoes a restart whose run has not begun."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    published = out / EARLIER / "published"
    for file in published.iterdir() if published.is_dir() else ():
        os.replace(file, out / file.name)
    if published.is_dir():
        published.rmdir()
    os.replace(out / EARLIER, out / FOLDER)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]
