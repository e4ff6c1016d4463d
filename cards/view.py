"""results.json as rows of text: everything that a card shows, ready formatted, "not measured" where nothing is."""

from __future__ import annotations

import os
import re
from typing import Any

from .formats import NOT_MEASURED, cell, count, duration, number, percent, size, tokens, with_error

__all__ = ["COLUMNS", "View", "card_kind"]

COLUMNS = ("student", "teacher", "window")
_CONTEXTS = (2048, 32_768, 131_072)  # whose state bytes are calculated where they were not measured
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Row = dict[str, Any]


def card_kind(results: Row) -> str:
    """ "converted", "trained", "adapter", or "model": of another origin, such as an imported checkpoint."""
    for part, kind in (("conversion", "converted"), ("recipe", "converted"), ("training", "trained")):
        if part in results:
            return kind
    return "adapter" if "adapter" in results else "model"


class View:
    """The card's contents. `results` is results.json as read; missing parts give "not measured", never an error.

    Args:
        plots: pictures beside the card that show these results.
        standalone: the folder holds modelling code, so that it loads without rnnzoo.
    """

    def __init__(self, results: Row, plots: tuple[str, ...] = (), standalone: bool = False):
        self.results = results
        self.kind = card_kind(results)
        self.plots, self.standalone = plots, standalone
        self.model: Row = results.get("model") or {}
        self.teacher: Row = results.get("teacher") or {}
        self.recipe: Row = results.get("recipe") or {}
        self.conversion: Row = results.get("conversion") or {}
        self.training: Row = results.get("training") or {}  # from scratch, where there is no teacher
        self.origin: Row = results.get("import") or {}  # another implementation's checkpoint
        self.adapter: Row = results.get("adapter") or {}
        self.evaluation: Row = results.get("evaluation") or {}
        self.environment: Row = results.get("environment") or {}
        self.publish: Row = results.get("publish") or {}
        self.snippet: Row = results.get("snippet") or {}
        self.samples: list[Row] = results.get("samples") or []

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
    def base_id(self) -> str | None:
        """The Hub id of what this model was made from: a teacher, an imported checkpoint, an adapter's base."""
        if self.kind in ("converted", "trained"):
            return self.teacher_id if self.kind == "converted" else None
        value = self.adapter.get("base_model") or self.origin.get("source")
        return str(value) if value and _HUB_ID.fullmatch(str(value)) else None

    @property
    def licence(self) -> str | None:
        """The publisher's word, else the licence of what the model was made from."""
        source = {"converted": self.teacher, "adapter": self.adapter, "trained": {}}.get(self.kind, self.origin)
        inherited = source.get("licence")
        if str(inherited).lower() == "other":  # the Hub's word for one without a name there
            inherited = source.get("licence_name") or inherited
        return self.publish.get("licence") or inherited

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

    @property
    def columns(self) -> tuple[str, ...]:
        """A converted model is compared, measured or not; any other one only where it was."""
        compared = {row["column"] for part in ("perplexity", "tasks", "recall", "decode") for row in self.rows(part)}
        return COLUMNS if self.kind == "converted" or compared - {"student"} else COLUMNS[:1]

    @property
    def heads(self) -> list[str]:
        names = ["this model", "teacher", f"teacher cut to {self.window_label}"]
        return names[: len(self.columns)]

    @property
    def ratio_head(self) -> list[str]:
        return ["this model : teacher"] if len(self.columns) > 1 else []

    def rows(self, part: str, **where: Any) -> list[Row]:
        return [r for r in self.evaluation.get(part) or [] if all(r.get(key) == value for key, value in where.items())]

    def _grouped(self, part: str, *keys: str) -> list[tuple[tuple[Any, ...], dict[str, Row]]]:
        """Rows of a part by the named fields, in order of appearance: [(fields, {column: row})]."""
        groups: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.evaluation.get(part) or []:
            groups.setdefault(tuple(row.get(key) for key in keys), {})[row["column"]] = row
        return list(groups.items())

    def _values(self, by: dict[str, Row], field: str, digits: int = 2, error: str | None = None) -> list[str]:
        rows = [by.get(column, {}) for column in self.columns]
        return [with_error(row.get(field), row.get(error) if error else None, digits) for row in rows]

    def _ratio(self, by: dict[str, Row], field: str) -> list[str]:
        if len(self.columns) == 1:
            return []
        student, teacher = (by.get(c, {}).get(field) for c in ("student", "teacher"))
        return [f"{student / teacher:.3f}" if student is not None and teacher else NOT_MEASURED]

    def comparison(self) -> list[list[str]]:
        """[measure, n, a value for each column, student : teacher]."""
        table = []
        for (dataset, window, stride), by in self._grouped("perplexity", "dataset", "window", "stride"):
            how = f"windows of {window:,}" if stride is None else f"windows of {window:,}, stride {stride:,}"
            n = f"{next(iter(by.values()))['n_tokens']:,} tokens"
            values = [*self._values(by, "value", 2, "stderr"), *self._ratio(by, "value")]
            table.append([f"perplexity, {cell(dataset)}, {how}", n, *values])
            values = [*self._values(by, "bits_per_byte", 3), *self._ratio(by, "bits_per_byte")]
            table.append(["bits per byte, same text", "same", *values])
        for (task, metric), by in self._grouped("tasks", "task", "metric"):
            sizes = {r.get("n") for r in by.values()}
            shown = " / ".join(count(n) for n in sorted(sizes, key=str))
            values = [*self._values(by, "value", 3, "stderr"), *self._ratio(by, "value")]
            table.append([f"{cell(metric)}, {cell(task)}", shown, *values])
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
        return self.revision_of(self.teacher)

    @staticmethod
    def revision_of(source: Row) -> str:
        sha, asked = source.get("sha"), source.get("revision")
        return cell(sha) if asked in (None, sha) else f"{cell(asked)} ({cell(sha)})"

    def environment_rows(self) -> list[list[str]]:
        return [[cell(name), cell(value)] for name, value in self.environment.items()]

    def positions(self) -> list[list[str]]:
        return [
            [f"{tokens(start)} to {tokens(end)}", *self._values(by, "perplexity")]
            for (start, end), by in self._grouped("by_position", "start", "end")
        ]

    def position_source(self) -> str:
        return next((cell(r["dataset"]) for r in self.rows("by_position") if r.get("dataset")), "one long text")

    def training_settings(self) -> list[list[str]]:
        own = self.training.get("settings") or {}
        names = ("context", "batch_size", "accumulate", "learning_rate", "warmup", "weight_decay")
        return [[name.replace("_", " "), cell(own[name])] for name in names if own.get(name) is not None]

    def _accuracies(self, by: dict[str, Row]) -> list[str]:
        return [count(next(iter(by.values())).get("n")), *self._values(by, "accuracy", 2, "stderr")]

    def recall(self) -> list[list[str]]:
        return [[count(back), *self._accuracies(by)] for (back,), by in self._grouped("recall", "distance")]

    def late_recall(self) -> list[list[str]]:
        """[tokens before, tokens back, n, accuracy of each column]."""
        groups = self._grouped("recall_by_context", "context", "distance")
        return [[count(context), count(back), *self._accuracies(by)] for (context, back), by in groups]

    def ablations(self) -> list[list[str]]:
        """[branch, its perplexity alone, its recall]."""
        return [
            [
                cell(row["branch"]),
                with_error(row.get("perplexity"), row.get("stderr")),
                ", ".join(f"{tokens(int(back))}: {value:.2f}" for back, value in (row.get("recall") or {}).items()),
            ]
            for row in self.rows("ablations")
        ]

    def ablation_text(self) -> str:
        """On what the branches were measured."""
        row = next(iter(self.rows("ablations")), {})
        return (
            f"{count(row.get('n_tokens'))} tokens of {cell(row.get('dataset'))}, windows of {count(row.get('window'))}"
        )

    @property
    def chance(self) -> float:
        return next((r["chance"] for r in self.rows("recall") if r.get("chance") is not None), 0.1)

    def states(self) -> list[list[str]]:
        """Measured, then calculated where every measurement lies on one line: [context, bytes of each column]."""
        measured = {context: by for (context,), by in self._grouped("decode", "context")}
        table = []
        for context in sorted({*measured, *(_CONTEXTS if measured else ())}):
            if by := measured.get(context):
                values = [size(by.get(column, {}).get("state_bytes")) for column in self.columns]
            else:
                values = [size(self._calculated(column, context)) for column in self.columns]
            if by or set(values) != {NOT_MEASURED}:
                table.append([tokens(context) + ("" if by else " (calculated)"), *values])
        return table

    def _calculated(self, column: str, context: int) -> int | None:
        rows = self.rows("decode", column=column)
        if column == "student":
            fixed, each = self.model.get("state_bytes"), self.model.get("state_bytes_per_token") or 0
        else:
            constant = len(rows) > 1 and len({row["state_bytes"] for row in rows}) == 1
            fixed = rows[0]["state_bytes"] if constant else 0
            each = 0 if constant or not rows else rows[0]["state_bytes"] / rows[0]["context"]
        if not rows or fixed is None or any(row["state_bytes"] != fixed + each * row["context"] for row in rows):
            return None
        return int(fixed + each * context)

    def speeds(self) -> list[list[str]]:
        return [
            [tokens(at), *self._values(by, "tokens_per_second", 1), *self._ratio(by, "tokens_per_second")]
            for (at,), by in self._grouped("decode", "context")
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
                with_error(stage.get("perplexity"), stage.get("perplexity_stderr")),
            ]
            for stage in self.conversion.get("stages") or []
        ]

    def stage_text(self) -> str:
        """What the perplexities of the ladder were measured on."""
        found = next((s for s in self.conversion.get("stages") or [] if s.get("perplexity_tokens")), None)
        if found is None:
            return f"Perplexity after each stage: {NOT_MEASURED}."
        text = f"Perplexity after each stage is that of {found['perplexity_tokens']:,} held-out tokens"
        teacher = self.conversion.get("teacher_perplexity") or {}
        if teacher.get("value") is None:
            return f"{text}."
        return f"{text}; the teacher has {with_error(teacher['value'], teacher.get('stderr'))} on them."

    def parity(self) -> list[list[str]]:
        """[what, value] of the comparison between reading a text at once and token by token."""
        table = []
        for row in self.rows("parity", column="student"):
            table += [
                ["tokens compared", f"{row['n']:,} after {row['context']:,} of context, {cell(row.get('dtype'))}"],
                ["largest difference of a probability", f"{row['max_probability']:.2e}"],
                ["largest difference of a log-probability, over the whole vocabulary", f"{row['max_abs']:.2e}"],
                ["mean KL divergence, nats a token", f"{row['mean_kl']:.2e}"],
                ["same most likely token", percent(row["same_token"], 1)],
            ]
        return table

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

    def energy(self) -> list[list[str]]:
        found = self.conversion.get("energy") or self.training.get("energy") or {}
        if found.get("energy_kwh") is None:
            return []
        whole = self.conversion.get("seconds") or self.training.get("seconds")
        during = duration(found.get("seconds")) + (f" (stages: {duration(whole)})" if whole else "")
        return [
            ["energy", f"{found['energy_kwh']:.4g} kWh"],
            ["CO2 equivalents", f"{1000 * found['emissions_kg']:.4g} g"],
            ["country of the power grid", cell(found.get("country"))],
            ["measured during", during],
            ["method", cell(found.get("source"))],
        ]

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

    def dataset_ids(self) -> list[str]:
        """Hub ids of the data: those that the run streamed, and those that the publisher names."""
        parts = ((self.conversion or self.training).get("data") or {}).values()
        sources = [str(part.get("source") or "") for part in parts if isinstance(part, dict)]
        words = [word.strip() for source in sources for word in re.split(r"[,;]", source)]
        streamed = [word.partition(":")[0] for word in words]  # local files are there by name, without a folder
        ids = [one for one in streamed if _HUB_ID.fullmatch(one)]
        return list(dict.fromkeys([*ids, *map(str, self.publish.get("datasets") or [])]))

    @property
    def collections(self) -> list[str]:
        return [str(one) for one in self.publish.get("collections") or []]
