"""results.json as rows of text: everything that a card shows, ready formatted, "not measured" where nothing is."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

import yaml

__all__ = ["COLUMNS", "NOT_MEASURED", "View"]

NOT_MEASURED = "not measured"
_OPTIONS = ("keep", "state-budget", "tokens", "seq-len")
COLUMNS = ("student", "teacher", "window")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Row = dict[str, Any]


def number(value: Any, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"


def count(value: Any) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def with_error(value: Any, stderr: Any, digits: int = 2) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def size(value: Any) -> str:
    """Bytes in decimal units, as `--state-budget 4MB` takes them."""
    if value is None:
        return NOT_MEASURED
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value} bytes"


def duration(seconds: Any) -> str:
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def tokens(value: Any) -> str:
    """1024 -> 1k, 2500 -> 2,500."""
    return NOT_MEASURED if value is None else f"{value // 1024}k" if value and value % 1024 == 0 else f"{value:,}"


def cell(text: Any) -> str:
    """Text that cannot break a table or a line."""
    if text in (None, ""):
        return NOT_MEASURED
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return " ".join(shown.replace("|", "\\|").split())


class View:
    """The card's contents. `results` is results.json as read; missing parts give "not measured", never an error."""

    def __init__(self, results: Row, plots: tuple[str, ...] = ()):
        self.results = results
        self.model: Row = results.get("model") or {}
        self.teacher: Row = results.get("teacher") or {}
        self.recipe: Row = results.get("recipe") or {}
        self.conversion: Row = results.get("conversion") or {}
        self.training: Row = results.get("training") or {}  # from scratch, where there is no teacher
        self.evaluation: Row = results.get("evaluation") or {}
        self.environment: Row = results.get("environment") or {}
        self.samples: list[Row] = results.get("samples") or []
        self.plots = plots

    # Names ----------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return os.path.basename(str(self.model.get("name") or "recurrent-model").rstrip("/"))

    @property
    def teacher_id(self) -> str | None:
        """The Hub id of the teacher; None where it is a local folder or file of unknown origin."""
        local = self.teacher.get("kind") in ("folder", "gguf")
        for value in (self.teacher.get("base_model"), None if local else self.teacher.get("name")):
            if value and _HUB_ID.fullmatch(str(value)):
                return str(value)
        return None

    @property
    def teacher_name(self) -> str:
        """Never a path of the machine that ran the conversion."""
        return self.teacher_id or os.path.basename(str(self.teacher.get("name") or "its teacher").rstrip("/"))

    @property
    def window_label(self) -> str:
        """The window that was measured; a hybrid's state grows with the context, and so does the window then."""
        baseline = self.evaluation.get("window_baseline") or {}
        rows = [row for part in ("perplexity", "by_position", "recall", "decode") for row in self.rows(part)]
        windows = {row["kv_window"] for row in rows if row["column"] == "window" and row.get("kv_window")}
        windows = windows or ({baseline["window"]} if baseline.get("window") else set())
        if not windows:
            return "a window"
        least, most = min(windows), max(windows)
        shown = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"window {shown} + {baseline.get('sinks', 4)} sinks"

    # Tables ---------------------------------------------------------------------------------------------------------

    def rows(self, part: str, **where: Any) -> list[Row]:
        return [r for r in self.evaluation.get(part) or [] if all(r.get(key) == value for key, value in where.items())]

    def _grouped(self, part: str, *keys: str) -> list[tuple[tuple[Any, ...], dict[str, Row]]]:
        """Rows of a part by the named fields, in order of appearance: [(fields, {column: row})]."""
        groups: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.evaluation.get(part) or []:
            groups.setdefault(tuple(row.get(key) for key in keys), {})[row["column"]] = row
        return list(groups.items())

    def comparison(self) -> list[list[str]]:
        """[measure, n, student, teacher, window, student : teacher]."""
        table = []
        for (dataset, window, stride), by in self._grouped("perplexity", "dataset", "window", "stride"):
            how = f"windows of {window:,}" if stride is None else f"windows of {window:,}, stride {stride:,}"
            first = next(iter(by.values()))
            values = [with_error(by.get(c, {}).get("value"), by.get(c, {}).get("stderr")) for c in COLUMNS]
            table.append(
                [
                    f"perplexity, {cell(dataset)}, {how}",
                    f"{first['n_tokens']:,} tokens",
                    *values,
                    self._ratio(by, "value"),
                ]
            )
            values = [number(by.get(c, {}).get("bits_per_byte"), 3) for c in COLUMNS]
            table.append(["bits per byte, same text", "same", *values, self._ratio(by, "bits_per_byte")])
        for (task, metric), by in self._grouped("tasks", "task", "metric"):
            sizes = {r.get("n") for r in by.values()}
            shown = " / ".join(count(n) for n in sorted(sizes, key=str))
            digits = 3
            values = [with_error(by.get(c, {}).get("value"), by.get(c, {}).get("stderr"), digits) for c in COLUMNS]
            table.append([f"{cell(metric)}, {cell(task)}", shown, *values, self._ratio(by, "value")])
        return table

    def sample_rows(self) -> list[list[str]]:
        return [[cell(sample["prompt"]), cell(sample["output"])] for sample in self.samples]

    def state(self) -> str:
        """Bytes of state; those of layers that are attention grow with the context."""
        text = size(self.model.get("state_bytes"))
        if more := self.model.get("state_bytes_per_token"):
            text += f", and {size(more)} for each token of context"
        if bits := self.model.get("window_bits"):
            text += f"; the window's keys in {bits[0]} and values in {bits[1]} bits"
        return text

    def teacher_revision(self) -> str:
        """The commit or content hash, with the branch or tag that was asked for."""
        sha, asked = self.teacher.get("sha"), self.teacher.get("revision")
        return cell(sha) if asked in (None, sha) else f"{cell(asked)} ({cell(sha)})"

    def environment_rows(self) -> list[list[str]]:
        return [[cell(name), cell(value)] for name, value in self.environment.items()]

    def convert_command(self) -> str:
        """With the values that the run had, the recipe's own or the user's."""
        words = ["rnnzoo", "convert", self._teacher_word(), "--recipe", self.recipe.get("name") or "RECIPE"]
        try:
            recipe = yaml.safe_load(self.recipe.get("yaml") or "")
        except yaml.YAMLError:
            recipe = None
        settings = recipe if isinstance(recipe, dict) else {}
        options = {option: settings.get(option.replace("-", "_")) for option in _OPTIONS}
        options |= {"seed": self.conversion.get("seed"), "dtype": self.model.get("dtype")}
        for option, value in options.items():
            words += [] if value is None else [f"--{option}", str(value)]
        return shlex.join([*words, "--out", self.name])

    def train_command(self) -> str:
        """With the settings of a training from scratch."""
        words = ["rnnzoo", "train", "--config", f"{self.name}/config.json"]
        own = self.training.get("settings") or {}
        known = ("context", "batch_size", "accumulate", "tokens", "steps", "learning_rate", "eval_fraction", "seed")
        for name in (*known, "dtype"):
            words += [] if own.get(name) is None else [f"--{name.replace('_', '-')}", str(own[name])]
        return shlex.join([*words, "--out", "again"])

    def eval_command(self) -> str:
        return shlex.join(["rnnzoo", "eval", self.name, "--against", self._teacher_word()])

    def _teacher_word(self) -> str:
        embedded = self.teacher.get("kind") == "embedded"
        return "embedded" if embedded else self.teacher_id or self.teacher_name

    @staticmethod
    def _ratio(by: dict[str, Row], field: str) -> str:
        student, teacher = (by.get(c, {}).get(field) for c in ("student", "teacher"))
        return f"{student / teacher:.3f}" if student is not None and teacher else NOT_MEASURED

    def positions(self) -> list[list[str]]:
        return [
            [f"{tokens(start)} to {tokens(end)}", *(number(by.get(c, {}).get("perplexity")) for c in COLUMNS)]
            for (start, end), by in self._grouped("by_position", "start", "end")
        ]

    def position_source(self) -> str:
        return next((cell(r["dataset"]) for r in self.rows("by_position") if r.get("dataset")), "one long text")

    @staticmethod
    def alone(table: list[list[str]], columns: int) -> list[list[str]]:
        """The first columns of a comparison: those of a model that has no teacher."""
        return [row[:columns] for row in table]

    def loss(self, name: str) -> str:
        return number(self.training.get(name), 4)

    def training_settings(self) -> list[list[str]]:
        own = self.training.get("settings") or {}
        names = ("context", "batch_size", "accumulate", "learning_rate", "warmup", "weight_decay")
        return [[name.replace("_", " "), cell(own[name])] for name in names if own.get(name) is not None]

    def recall(self) -> list[list[str]]:
        table = []
        for (distance,), by in self._grouped("recall", "distance"):
            n = next(iter(by.values())).get("n")
            values = [with_error(by.get(c, {}).get("accuracy"), by.get(c, {}).get("stderr")) for c in COLUMNS]
            table.append([count(distance), count(n), *values])
        return table

    @property
    def chance(self) -> float:
        return next((r["chance"] for r in self.rows("recall") if r.get("chance") is not None), 0.1)

    def states(self) -> list[list[str]]:
        return [
            [tokens(context), *(size(by.get(c, {}).get("state_bytes")) for c in COLUMNS)]
            for (context,), by in self._grouped("decode", "context")
        ]

    def speeds(self) -> list[list[str]]:
        return [
            [
                tokens(c_),
                *(number(by.get(c, {}).get("tokens_per_second"), 1) for c in COLUMNS),
                self._ratio(by, "tokens_per_second"),
            ]
            for (c_,), by in self._grouped("decode", "context")
        ]

    def decode_conditions(self) -> str:
        row = next(iter(self.rows("decode")), {})
        return f"{cell(row.get('device'))}, {cell(row.get('dtype'))}, batch 1"

    def stages(self) -> list[list[str]]:
        return [
            [
                cell(stage.get("name")),
                count(stage.get("tokens")),
                duration(stage.get("seconds")),
                number(stage.get("loss_first"), 4),
                number(stage.get("loss_last"), 4),
                number(stage.get("perplexity")),
            ]
            for stage in self.conversion.get("stages") or []
        ]

    def layers(self) -> list[list[str]]:
        """[layers, mixer, window per kv head], equal neighbours joined."""
        types = self.model.get("layer_types") or []
        windows = self.model.get("windows") or []
        table: list[list[Any]] = []
        for index, kind in enumerate(types):
            window = windows[index] if index < len(windows) and windows[index] else None
            whole = "all" if kind == "full_attention" else "none"
            shown = ", ".join(str(w) for w in window) if window else whole
            if table and table[-1][2:] == [kind, shown]:
                table[-1][1] = index
            else:
                table.append([index, index, kind, shown])
        return [[str(a) if a == b else f"{a} to {b}", kind, shown] for a, b, kind, shown in table]

    @staticmethod
    def _amount(part: Row) -> str:
        unit = next((unit for unit in ("tokens", "characters") if part.get(unit) is not None), None)
        return NOT_MEASURED if unit is None else f"{part[unit]:,} {unit}"

    def data(self) -> list[list[str]]:
        """[use, source, size, SHA-256]: of the conversion and of every evaluation set."""
        parts = (self.conversion or self.training).get("data") or {}
        table = [
            [use, cell(part.get("source")), self._amount(part), cell(part.get("sha256"))]
            for use, part in parts.items()
            if isinstance(part, dict)
        ]
        for dataset in self.evaluation.get("datasets") or []:
            table.append(
                ["evaluation", cell(dataset.get("name")), cell(dataset.get("size")), cell(dataset.get("sha256"))]
            )
        return table
