"""What a Hub on loopback holds and what its tests ask of it; `hub_double.py` answers the requests."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

__all__ = ["Fault", "HubDouble", "Repository"]


@dataclass
class Fault:
    """An answer on order: the next `times` requests that match get `status`, or lose their connection (status 0), or,
    with status 0 and `after`, lose it once they are done, so that the answer alone is lost."""

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after: bool = False


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)  # id -> path -> ("lfs"|"file", hash)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class HubDouble:
    """The state of the double, for tests to set up and look at."""

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by SHA-256 (large) or Git's SHA-1
        self.tokens: dict[str, tuple[str, bool]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[tuple[str, int]] = []  # (hash, bytes) of the large files that arrived whole
        self.stalling: set[str] = set()  # hashes of large files whose upload stops half-way and stays so
        self.stalled = threading.Event()
        self.arrived = threading.Semaphore(0)  # released for each of `uploads`
        self.release = threading.Event()
        self.lock = threading.RLock()

    def add_token(self, token: str, user: str, write: bool = True) -> None:
        self.tokens[token] = (user, write)

    def fail(self, method: str, path: str, status: int, **options: Any) -> None:
        """`path` is a regular expression that is searched for."""
        self.faults.append(Fault(method, path, status, **options))

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """For a process that takes the double for the Hub; `home` is its empty cache."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "RNNZOO_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        return kept | own | ({"HF_TOKEN": token} if token else {}) | more

    def serve(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None, **more: str) -> None:
        """The same in this process, until `patch` is undone: what huggingface_hub has read already is set again."""
        wanted = self.environment(home, token, **more)
        for key in os.environ.keys() - wanted.keys():
            patch.delenv(key)
        for key, value in wanted.items():
            patch.setenv(key, value)
        patch.setattr(constants, "ENDPOINT", wanted["HF_ENDPOINT"])
        patch.setattr(constants, "HF_HUB_OFFLINE", wanted.get("HF_HUB_OFFLINE") == "1")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "HF_HUB_CACHE", "HF_XET_CACHE"):
            patch.setattr(constants, name, str(home / name.lower()))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo]
        tree = found.commits[self.resolve(found, revision) or ""]
        return {path: self.blobs[key] for path, (_, key) in tree.items()}

    def resolve(self, repo: Repository, revision: str) -> str | None:
        return (
            repo.branches.get(revision) or repo.tags.get(revision) or (revision if revision in repo.commits else None)
        )

    def create(self, name: str, private: bool = False) -> Repository:
        """As the Hub does it: with a first commit that holds .gitattributes."""
        repo = self.repositories[name] = Repository(private)
        self.commit(repo, "main", {".gitattributes": ("file", self.store(b"*.safetensors filter=lfs\n"))}, "initial")
        return repo

    def store(self, content: bytes) -> str:
        key = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[key] = content
        return key

    def commit(self, repo: Repository, branch: str, tree: dict[str, tuple[str, str]], message: str) -> str:
        base = f"{repo.branches.get(branch)} {len(repo.commits)} {sorted(tree.items())} {message}"
        sha = hashlib.sha1(base.encode()).hexdigest()
        repo.commits[sha], repo.messages[sha], repo.branches[branch] = tree, message, sha
        return sha
