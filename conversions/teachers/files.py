"""Files of a teacher: where they are cached, whether they are whole, what identifies them.

Everything that can go wrong with a file (missing, cut short, no permission, no space) leaves this module and its
callers as a `RnnzooError` of one sentence.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...kernels.cache import cache_root
from ...kernels.errors import RnnzooError

__all__ = ["cache_root", "content_hash", "foreign_code", "hub_reachable", "quiet_loading", "user_errors"]

FULL_HASH_BYTES = 2 << 30
SAMPLE_BYTES = 1 << 16
SAMPLES_PER_FILE = 256


@contextmanager
def user_errors(action: str) -> Iterator[None]:
    """Turns what the operating system refuses into one sentence that starts with `action`.

    Raises:
        RnnzooError: no space, no permission, a read-only disk, a path that is a folder, and any other OSError.
    """
    try:
        yield
    except RnnzooError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise RnnzooError(f"{action}: {reason}") from error


def _refusal(error: Exception) -> str | None:
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and tokenizers write through Rust and report a full disk as text only, torch as "iostream error".
    full = "No space left on device" in str(error) or "iostream error" in str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or full:
        return f"the disk is full{where}; free some space or set RNNZOO_CACHE or --out to another disk."
    if number in (errno.EACCES, errno.EPERM) or "Permission denied" in str(error):
        return f"no permission{where}; choose a place that you may write to (RNNZOO_CACHE for the cache)."
    if number == errno.EROFS:
        return f"the disk is read-only{where}; choose another place (RNNZOO_CACHE for the cache)."
    if isinstance(error, OSError):
        return f"{error.strerror or error}{where}."
    return None


def content_hash(paths: list[Path]) -> str:
    """What identifies these files' contents, in this order: "sha256:<hex>".

    Above 2 GiB in all, hashing would take longer than planning may: then the sizes and 256 evenly spaced blocks of
    64 KiB of each file are hashed, and the result says so: "sampled-sha256:<hex>".
    """
    sampled = sum(path.stat().st_size for path in paths) > FULL_HASH_BYTES
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            if not sampled:
                while block := file.read(1 << 22):
                    digest.update(block)
                continue
            digest.update(f"{path.name}:{size}".encode())
            for i in range(SAMPLES_PER_FILE):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES_PER_FILE - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return ("sampled-sha256:" if sampled else "sha256:") + digest.hexdigest()


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hub answers within `timeout` seconds. False under HF_HUB_OFFLINE, without asking."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=False)
    except Exception:  # whatever the reason, the answer is that it cannot be reached
        return False
    return True


def foreign_code(source: str | Path, error: ValueError) -> RnnzooError | None:
    """What to say where transformers would need code that comes with a model; None where the error is another."""
    if "trust_remote_code" not in str(error):
        return None
    return RnnzooError(
        f"{source} needs Python code of its own, and rnnzoo does not run it; read that code, and if you trust it, add "
        "--trust-remote-code."
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bars, which would break the converter's."""
    from transformers.utils import logging

    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed:
            logging.enable_progress_bar()
