"""What the Hub refuses, as one sentence; what passes by itself, tried again.

huggingface_hub retries each request of an upload, a listing and the preupload query; creating repositories, branches
and tags, reading a repository's state and the commit it asks once. All go through `retrying`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ..kernels.errors import RnnzooError

__all__ = ["retrying", "sentence", "waiting_time"]

T = TypeVar("T")
TRIES = 4
PASSING = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 300.0  # seconds; who is told to wait longer should not find a silent program


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what stopped an upload in a RuntimeError without a word on it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error; None where there was no answer."""
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def _no_answer(error: BaseException) -> bool:
    """A connection that failed or broke. The HTTP library differs between versions of huggingface_hub."""
    error = _cause(error)
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))


def waiting_time(error: BaseException, attempt: int) -> float | None:
    """Seconds until the next try after the `attempt`-th (from 0) failed; None where another try is no use."""
    status = status_of(error)
    if status is None:
        return float(2**attempt) if _no_answer(error) else None
    if status not in PASSING:
        return None
    headers = {key.lower(): value for key, value in _cause(error).response.headers.items()}  # type: ignore[attr-defined]
    asked = _retry_after(headers)
    return float(2**attempt) if asked is None else asked if asked <= LONGEST_WAIT else None


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds, from Retry-After (a number or a date) or the Hub's own RateLimit header."""
    stated = headers.get("retry-after", "").strip()
    if stated.isdigit():
        return float(stated)
    if stated:
        try:
            return max(0.0, (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds())
        except (TypeError, ValueError):
            return None
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def retrying(
    call: Callable[[], T], note: Callable[[str], None], again: Callable[[int | None], bool] = lambda status: True
) -> T:
    """Calls up to TRIES times while the Hub is busy (408, 429, 5xx) or does not answer; waits as long as it asks for.

    Args:
        note: is told of each wait. again: whether another call is safe after this status (None: no answer).
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            wait, said = waiting_time(error, attempt), status_of(error)
            if wait is None or attempt + 1 == TRIES or not again(said):
                raise
            note(f"the Hub {f'answers {said}' if said else 'does not answer'}; trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("the last call returns or raises")


def sentence(error: BaseException, repo: str, branch: str = "main") -> RnnzooError | None:
    """What a user should read of an error on the way to the Hub; None for errors that are none of the Hub's."""
    from huggingface_hub import constants, errors

    error = _cause(error)
    status = status_of(error)
    if status is None:
        if isinstance(error, errors.OfflineModeIsEnabled):
            return RnnzooError("HF_HUB_OFFLINE is set: a push needs the Hub (--dry-run does not).")
        if isinstance(error, errors.HFValidationError):
            return RnnzooError(f"{repo} is no name of a repository: expected 'owner/name' ({_first(error)}).")
        if _no_answer(error):
            return RnnzooError(
                f"The Hub at {constants.ENDPOINT} cannot be reached or broke off ({_first(error)}); run the same "
                "command again, and what was uploaded is not sent again."
            )
        if isinstance(error, ValueError | RuntimeError):  # invalid card metadata, errors of file storage
            return RnnzooError(f"The Hub did not take the push to {repo}: {' '.join(str(error).split())[:300]}")
        return None
    said = _server_words(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return RnnzooError(f"{repo} has no branch {branch} (404); check --branch.")
    if status == 401 and "RepoNotFound" not in _code(error):
        return RnnzooError(
            f"The Hub does not accept the token (401{said}): log in with `hf auth login`, or set HF_TOKEN to one "
            "that may write."
        )
    if status in (401, 404):
        return RnnzooError(f"There is no repository {repo} on the Hub, or the token may not see it ({status}{said}).")
    if status == 403:
        return RnnzooError(
            f"The token may not write to {repo} (403{said}): use one with write access, or --pr for a pull request."
        )
    if status in (409, 412):
        return RnnzooError(
            f"{repo} (branch {branch}) was changed by somebody else during this push ({status}{said}): look at it, "
            "then run the same command again; what was uploaded is not sent again."
        )
    if status == 429:
        asked = _retry_after({key.lower(): value for key, value in error.response.headers.items()})  # type: ignore[attr-defined]
        wait = f"in {asked:.0f} s" if asked else "in some minutes"
        return RnnzooError(
            f"The Hub limits the number of requests (429{said}): run the same command again {wait}; what was uploaded "
            "is not sent again."
        )
    if status >= 500:
        return RnnzooError(
            f"The Hub is in trouble ({status}{said}): run the same command again later; what was uploaded is not sent "
            "again."
        )
    return RnnzooError(f"The Hub refused the push to {repo} ({status}{said}).")


def _code(error: Any) -> str:
    return error.response.headers.get("X-Error-Code") or ""


def _server_words(error: Any) -> str:
    words = " ".join((getattr(error, "server_message", None) or "").split())
    return f": {words[:200].rstrip('.')}" if words else ""


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
