"""A folder to the Hub: one commit of what changed, which an interrupted upload goes on with.

Files go to large file storage first, each known there by its hash, then one commit names them all. So a push that was
stopped sends on the next call only what is not there, and a reader never sees half a model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from ..kernels.errors import RnnzooError
from .hub_errors import retrying, sentence
from .published import PublishedFile, stale_weights

__all__ = ["Pushed", "push_files"]

Note = Callable[[str], None]


@dataclass
class Pushed:
    """What a push did.

    Attributes:
        repo, url, branch: where. commit: the branch's head after it (of a pull request: the commit proposed).
        created: the repository is new. uploaded, deleted: paths. unchanged: number of files that were there already.
        tag: name of the tag that stands on `commit`. pull_request: its address.
    """

    repo: str
    url: str
    branch: str
    commit: str
    created: bool
    uploaded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    unchanged: int = 0
    tag: str | None = None
    pull_request: str | None = None


def push_files(
    files: list[PublishedFile],
    repo: str,
    *,
    private: bool = False,
    branch: str = "main",
    tag: str | None = None,
    pull_request: bool = False,
    message: str | None = None,
    note: Note = lambda _: None,
) -> Pushed:
    """Brings a branch of a repository to hold `files`; what is there already is not sent, and nothing else is touched
    but weight files of an earlier push that are no longer part of the model.

    Args:
        repo: "owner/name", or "name" in the token's own space. It is made where there is none.
        private: make it private; an existing public one is refused. branch: made where there is none.
        tag: set on the commit. pull_request: propose the commit instead of making it.
        message: of the commit. note: is told of waiting and of what has no place in the result.
    Raises:
        RnnzooError: offline, no token, a repository, branch or tag that does not go, whatever the Hub refuses (401,
            403, 404, 409, ...), and what did not pass after some tries (429, 5xx, a broken connection).
    """
    if constants.is_offline_mode():
        raise RnnzooError("HF_HUB_OFFLINE is set: a push needs the Hub (--dry-run does not).")
    if not get_token():
        raise RnnzooError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    if pull_request and tag:
        raise RnnzooError("A tag needs a commit on a branch, not a pull request; give --tag or --pr, not both.")
    api = HfApi(library_name="rnnzoo", library_version=_version())
    try:
        return _Push(api, repo, branch, note).run(files, private, tag, pull_request, message)
    except RnnzooError:
        raise
    except Exception as error:
        said = sentence(error, repo, branch)
        if said is None:
            raise
        raise said from error
    finally:
        _end_bars()


def _end_bars() -> None:
    """huggingface_hub leaves the bars of stopped uploads open: they would be drawn once more after the last word."""
    from huggingface_hub.utils import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


class _Push:
    def __init__(self, api: HfApi, repo: str, branch: str, note: Note):
        self.api, self.repo, self.branch, self.note = api, repo, branch, note
        self.additions: dict[str, CommitOperationAdd] = {}

    def run(
        self, files: list[PublishedFile], private: bool, tag: str | None, pull_request: bool, message: str | None
    ) -> Pushed:
        if "/" not in self.repo:
            self.repo = f"{self._ask(self.api.whoami)['name']}/{self.repo}"
        created = self._open_repository(private, pull_request)
        refs = self._open_branch() if self.branch != "main" or tag else None
        tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None) if refs else None
        message = message or f"Upload with rnnzoo {_version()}".strip()
        done = self._commit(files, pull_request, message, created, tag, tagged)
        if tag and tagged is None:
            self._ask(self.api.create_tag, self.repo, tag=tag, revision=done.commit, exist_ok=True)
        done.tag = tag
        return done

    def _ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return retrying(functools.partial(function, *arguments, **options), self.note)

    def _open_repository(self, private: bool, pull_request: bool) -> bool:
        """Whether it had to be made."""
        try:
            found = self._ask(self.api.repo_info, self.repo)
        except RepositoryNotFoundError:
            if pull_request:
                raise RnnzooError(
                    f"There is no repository {self.repo} to propose a pull request to; push without --pr to make it."
                ) from None
            self._ask(self.api.create_repo, self.repo, private=private or None, exist_ok=True)
            return True
        if private and found.private is False:
            raise RnnzooError(
                f"{self.repo} exists and is public, so a push would not be private: make it private in its settings on "
                "the Hub, or choose another name."
            )
        return False

    def _open_branch(self) -> Any:
        """Makes the branch where it is missing; returns the repository's branches and tags."""
        refs = self._ask(self.api.list_repo_refs, self.repo)
        special = self.branch.startswith("refs/")  # a pull request, which is not ours to make
        if self.branch != "main" and not special and self.branch not in {ref.name for ref in refs.branches}:
            self._ask(self.api.create_branch, self.repo, branch=self.branch, exist_ok=True)
            self.note(f"made the branch {self.branch}")
        return refs

    def _commit(
        self,
        files: list[PublishedFile],
        pull_request: bool,
        message: str,
        created: bool,
        tag: str | None,
        tagged: str | None,
    ) -> Pushed:
        """Uploads and commits. After an answer that was lost, the branch tells whether the commit was made."""
        url = f"{self.api.endpoint}/{self.repo}"
        parent, uploaded = None, ([], [])

        def once() -> Pushed:
            nonlocal parent, uploaded
            head = str(self.api.repo_info(self.repo, revision=self.branch).sha)
            changed, gone = self._compare(files, head)
            same = len(files) - len(changed)
            if parent is None and tagged and (tagged != head or changed or gone):
                raise RnnzooError(f"{self.repo} has a tag {tag} already, on another commit; choose another one.")
            if not changed and not gone:
                return Pushed(self.repo, url, self.branch, head, created, *uploaded, unchanged=same)
            if parent not in (None, head):
                raise RnnzooError(
                    f"{self.repo} (branch {self.branch}) was changed by somebody else during this push: look at it, "
                    "then run the same command again; what was uploaded is not sent again."
                )
            parent, uploaded = head, ([file.path_in_repo for file in changed], gone)
            commit = self.api.create_commit(
                self.repo,
                [*changed, *(CommitOperationDelete(path) for path in gone)],
                commit_message=message,
                revision=self.branch,
                create_pr=pull_request,
                parent_commit=head,
            )
            done = Pushed(self.repo, url, self.branch, commit.oid, created, *uploaded, unchanged=same)
            done.pull_request = commit.pr_url if pull_request else None
            return done

        # A pull request that was made, its answer lost, cannot be told from one that was not.
        return retrying(once, self.note, again=lambda status: not (pull_request and parent) or status in (429, 503))

    def _compare(self, files: list[PublishedFile], head: str) -> tuple[list[CommitOperationAdd], list[str]]:
        """(files that differ from the commit `head`, stale weights there)."""
        listed = self.api.list_repo_tree(self.repo, revision=head, recursive=True)
        remote: dict[str, Any] = {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}
        changed = []
        for file in files:
            there = remote.get(file.path)
            if there is None or there.size != file.size or not _same(self._addition(file), there):
                changed.append(self._addition(file))
        return changed, stale_weights(list(remote), [file.path for file in files])

    def _addition(self, file: PublishedFile) -> CommitOperationAdd:
        """Hashed once, however often the commit is tried."""
        if file.path not in self.additions:
            content = file.source if isinstance(file.source, bytes) else str(file.source)
            self.additions[file.path] = CommitOperationAdd(file.path, content)
        return self.additions[file.path]


def _same(local: CommitOperationAdd, remote: RepoFile) -> bool:
    if remote.lfs is not None:
        return remote.lfs.sha256 == local.upload_info.sha256.hex()
    with local.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def _version() -> str:
    with contextlib.suppress(PackageNotFoundError):  # run from a source tree
        return version("rnnzoo")
    return ""
