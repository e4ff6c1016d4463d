"""The limits of a model in plain words, each sentence derived from the numbers beside it."""

from __future__ import annotations

from .formats import count, listed, percent, size, tokens
from .view import View

__all__ = ["limits"]


def limits(view: View) -> list[str]:
    """Sentences for the section on limits. What was not measured is named at the end."""
    sentences = [
        *_perplexity(view),
        *_tasks(view),
        *_recall(view),
        *_branches(view),
        *_positions(view),
        *_memory(view),
        *_parity(view),
    ]
    missing = [
        label
        for part, label in (
            ("perplexity", "perplexity"),
            ("tasks", "tasks"),
            ("recall", "recall by distance"),
            ("by_position", "quality by position in a long text"),
            ("decode", "decoding speed and state bytes"),
            ("parity", "reading at once against token by token"),
        )
        if not view.rows(part, column="student")
    ]
    sentences.append(
        f"Not measured: {', '.join([*missing, 'other languages', 'code', 'factual accuracy', 'bias', 'safety'])}."
    )
    return sentences


def _perplexity(view: View) -> list[str]:
    found = []
    for row in view.rows("perplexity", column="student"):
        same = {key: row.get(key) for key in ("dataset", "window", "stride")}
        teacher = next(iter(view.rows("perplexity", column="teacher", **same)), None)
        window = next(iter(view.rows("perplexity", column="window", **same)), None)
        where = f"On {row['dataset']} (windows of {row['window']:,} tokens)"
        if teacher:
            ratio = row["value"] / teacher["value"]
            found.append(f"{where} its perplexity is {ratio:.2f} times that of its teacher.")
        if window:
            better = row["value"] < window["value"]
            found.append(
                f"{where} it is {'better' if better else 'not better'} than the teacher cut to a window of the same "
                f"bytes: {row['value']:.2f} against {window['value']:.2f}."
            )
    return found


def _tasks(view: View) -> list[str]:
    lost = []
    for row in view.rows("tasks", column="student", metric="accuracy"):
        teacher = next(iter(view.rows("tasks", column="teacher", task=row["task"], metric="accuracy")), None)
        if teacher and row["value"] < teacher["value"]:
            lost.append(f"{100 * (teacher['value'] - row['value']):.1f} points on {row['task']} (n = {row['n']})")
    return [f"Against its teacher it loses {', '.join(lost)}."] if lost else []


def _recall(view: View) -> list[str]:
    """Where half is no longer reached, and where one-sided 95% of the binomial error no longer excludes chance."""
    rows = sorted(view.rows("recall", column="student"), key=lambda row: row["distance"])
    if not rows:
        return []
    chance = view.chance
    above = [row["distance"] for row in rows if row["accuracy"] - 1.65 * (row.get("stderr") or 0) > chance]
    beyond = [row["distance"] for row in rows if row["distance"] not in above]
    found = _half(rows)
    if not above:
        return [*found, f"At no measured distance does it recall a phrase better than chance ({percent(chance)})."]
    found.append(f"It recalls a phrase better than chance ({percent(chance)}) from {_distances(above)} tokens back.")
    if beyond:
        found.append(
            f"From {_distances(beyond)} tokens back recall cannot be told from chance: do not rely on details there."
        )
    return found


def _branches(view: View) -> list[str]:
    """Does the model need its recurrent state, or does the window do all of the work?"""
    alone = {row["branch"]: row.get("perplexity") for row in view.rows("ablations")}
    whole, window = alone.get("whole"), alone.get("window")
    if whole is None or window is None:
        return []
    share = "the same" if abs(window / whole - 1) < 0.005 else f"{window / whole:.2f} times as high"
    found = [f"With its exact windows alone, without the linear state, its perplexity is {share}."]
    if "linear" in alone:
        linear = alone["linear"]
        times = "beyond measure" if linear is None else f"{linear / whole:,.3g} times as high"
        found.append(f"With the linear state alone, without the windows, its perplexity is {times}.")
    return found


def _half(rows: list[dict]) -> list[str]:
    """From the first distance on at which less than half is recalled."""
    first = next((i for i, row in enumerate(rows) if row["accuracy"] < 0.5), None)
    n = f"n = {rows[0]['n']} at each distance" if rows[0].get("n") else "n not recorded"
    if first is None:
        return [f"Its recall stays at 50 % or more up to {rows[-1]['distance']:,} tokens, the longest measured ({n})."]
    low = rows[first]
    if first == 0:
        return [f"Its recall is below 50 % already {low['distance']:,} tokens back: {percent(low['accuracy'])} ({n})."]
    last = rows[first - 1]
    again = " It rises above that again further back." if any(row["accuracy"] >= 0.5 for row in rows[first:]) else ""
    return [
        f"Its recall falls below 50 % beyond {last['distance']:,} tokens: {percent(last['accuracy'])} there, "
        f"{percent(low['accuracy'])} at {low['distance']:,} ({n}).{again}"
    ]


def _distances(distances: list[int]) -> str:
    return listed([f"{distance:,}" for distance in distances])


def _positions(view: View) -> list[str]:
    rows = view.rows("by_position", column="student")
    base = next((row for row in rows if row["start"] == 2048), None)
    if base is None or rows[-1] is base:
        return []
    last = rows[-1]
    ratio = last["perplexity"] / base["perplexity"]
    return [
        f"In a long text the perplexity of tokens {tokens(last['start'])} to {tokens(last['end'])} is {ratio:.2f} "
        f"times that of tokens {tokens(base['start'])} to {tokens(base['end'])}."
    ]


def _memory(view: View) -> list[str]:
    rows = view.rows("decode", column="student")
    if not rows:
        return []
    least, most = min(r["state_bytes"] for r in rows), max(r["state_bytes"] for r in rows)
    first, last = min(r["context"] for r in rows), max(r["context"] for r in rows)
    if least == most:
        found = [
            f"Its state is {size(most)} at any length (measured from {count(first)} to {count(last)} tokens): "
            "what does not fit is forgotten."
        ]
    else:
        found = [
            f"Its state grows from {size(least)} at {count(first)} tokens to {size(most)} at {count(last)}, because "
            "some layers keep attention."
        ]
    slower = [
        row["context"]
        for row in rows
        for teacher in view.rows("decode", column="teacher", context=row["context"])
        if row["tokens_per_second"] < teacher["tokens_per_second"]
    ]
    if slower:
        found.append(f"It decodes slower than its teacher at a context of {_distances(sorted(slower))} tokens.")
    return found


def _parity(view: View) -> list[str]:
    """Worth a sentence where reading at once and token by token would choose differently."""
    return [
        f"Read at once and token by token it names another most likely token in {percent(1 - row['same_token'], 1)} of "
        f"{row['n']} places, because {row.get('dtype')} rounds differently."
        for row in view.rows("parity", column="student")
        if row["same_token"] < 1
    ]
