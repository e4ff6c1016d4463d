"""A Hub on loopback for tests: repositories, commits, large files, tags, pull requests, tokens, and faults on order.

with hub_double() as hub:                              # or the fixture of this name, see tests/conftest.py
    hub.add_token("hf_alice", "alice")
    subprocess.run([...], env=hub.environment(tmp_path, token="hf_alice"))
    hub.files("alice/model")                           # {path: bytes} of main

huggingface_hub reads HF_ENDPOINT when it is imported: what talks to the double runs in a process of its own, with
`environment`, or where `serve` has set what was read.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_state import Fault, HubDouble, Repository

__all__ = ["HubDouble", "hub_double"]


class _Refusal(Exception):
    def __init__(self, status: int, message: str = "", code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubDouble
    body = b""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # Around every request ------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = self._fault(path)
        if fault and not fault.after and fault.status == 0:
            return self._drop(fault)
        if not self._read_body(path):
            return None
        if fault and not fault.after:
            return self._send(
                fault.status, {"error": fault.message}, {"X-Error-Message": fault.message, **fault.headers}
            )
        try:
            with self.hub.lock:
                status, value, headers = self._route(path)
        except _Refusal as refusal:
            status, value, headers = refusal.status, refusal.body, refusal.headers
        if fault:
            return self._drop(fault)
        return self._send(status, value, headers)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _drop(self, fault: Fault) -> None:
        """Closes the connection; of a body, half is read first."""
        if not fault.after:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _read_body(self, path: str) -> bool:
        """False: the connection broke, or the upload was to stall and was then cut."""
        size = int(self.headers.get("Content-Length") or 0)
        try:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while count := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(count))
                    self.rfile.readline()
                self.rfile.readline()
                self.body = b"".join(parts)
                return True
            if self.command == "PUT" and path.rpartition("/")[2] in self.hub.stalling:
                self.rfile.read(size // 2)
                self.hub.stalled.set()
                self.hub.release.wait()  # until the double ends
                self.close_connection = True
                return False
            self.body = self.rfile.read(size)
            return len(self.body) == size
        except (OSError, ValueError):
            self.close_connection = True
            return False

    def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key, text)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may what --------------------------------------------------------------------------------------------------

    def _user(self) -> tuple[str, bool] | None:
        stated = self.headers.get("Authorization", "")
        if not stated:
            return None
        user = self.hub.tokens.get(stated.removeprefix("Bearer "))
        if user is None:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, name: str, write: bool = False) -> Repository:
        user, repo = self._user(), self.hub.repositories.get(name)
        own = user is not None and user[0] == name.partition("/")[0]
        if repo is None or (repo.private and not own):
            raise _Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not (own and user and user[1]):
            raise _Refusal(403, "You don't have the rights to write to this repository" if own else "Forbidden")
        return repo

    def _revision(self, repo: Repository, revision: str) -> str:
        sha = self.hub.resolve(repo, revision)
        if sha is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        return sha

    # Endpoints -----------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> tuple[int, Any, dict[str, str]]:
        name = r"(?P<name>[\w.-]+/[\w.-]+)"
        table = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
            ("POST", rf"/api/models/{name}/branch/(?P<branch>.+)", self._branch),
            ("POST", rf"/api/models/{name}/tag/(?P<revision>.+)", self._tag),
            ("GET", rf"/api/models/{name}/refs", self._refs),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", self._tree),
            ("GET", rf"/api/models/{name}(/revision/(?P<revision>.+))?", self._info),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>\w+)", self._put),
            ("POST", r"/lfs/verify", self._verify),
            ("GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            ("HEAD", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        if self.command in ("GET", "HEAD") and path == "/":
            return 200, {}, {}
        for method, pattern, function in table:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                value = function(**match.groupdict())
                return value if isinstance(value, tuple) else (200, value, {})
        raise _Refusal(404, f"No endpoint {self.command} {path}", "EntryNotFound")

    def _create(self) -> Any:
        asked, user = json.loads(self.body), self._user()
        name = f"{asked.get('organization') or (user or ('?', False))[0]}/{asked['name']}"
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        if not user[1] or user[0] != name.partition("/")[0]:
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise _Refusal(409, "You already created this model repo", url=url)
        self.hub.create(name, private=asked.get("visibility") == "private")
        return {"url": url}

    def _whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        return {"name": user[0], "type": "user", "orgs": []}

    def _preupload(self, name: str, revision: str) -> Any:
        repo = self._repository(name, write="create_pr" not in self.query)
        tree = repo.commits[self._revision(repo, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            oid = tree.get(file["path"], ("", None))[1]
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, name: str) -> Any:
        self._repository(name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "The content does not have this hash")
        self.hub.blobs[oid] = self.body
        self.hub.uploads.append((oid, len(self.body)))
        self.hub.arrived.release()
        return b""

    def _verify(self) -> Any:
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "The object is not there")
        return {}

    def _commit(self, name: str, revision: str) -> Any:
        proposed = "create_pr" in self.query
        repo = self._repository(name, write=not proposed)
        head = self._revision(repo, revision)
        tree, header = dict(repo.commits[head]), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[value["path"]] = ("file", self.hub.store(base64.b64decode(value["content"])))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refusal(400, f"The large file {value['path']} was not uploaded")
                tree[value["path"]] = ("lfs", value["oid"])
            elif key == "deletedFile":
                del tree[value["path"]]
            else:
                raise _Refusal(400, f"Unknown operation {key}")
        if header.get("parentCommit") not in (None, head):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        branch = revision
        if proposed:
            branch = f"refs/pr/{1 + sum(key.startswith('refs/pr/') for key in repo.branches)}"
        sha = self.hub.commit(repo, branch, tree, header["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{branch.rpartition('/')[2]}"
        return answer

    def _branch(self, name: str, branch: str) -> Any:
        repo = self._repository(name, write=True)
        if branch in repo.branches:
            raise _Refusal(409, "Reference already exists")
        repo.branches[branch] = self._revision(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
        return {}

    def _tag(self, name: str, revision: str) -> Any:
        repo, tag = self._repository(name, write=True), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise _Refusal(409, "Tag reference exists already")
        repo.tags[tag] = self._revision(repo, revision)
        return {}

    def _refs(self, name: str) -> Any:
        repo = self._repository(name)

        def listed(kind: str, entries: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": sha}
                for key, sha in entries.items()
                if not key.startswith("refs/")
            ]

        return {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}

    def _info(self, name: str, revision: str | None) -> Any:
        repo = self._repository(name)
        sha = self._revision(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def _tree(self, name: str, revision: str, folder: str) -> Any:
        repo = self._repository(name)
        entries, prefix = [], f"{folder}/" if folder else ""
        for path, (kind, key) in repo.commits[self._revision(repo, revision)].items():
            if not path.startswith(prefix):
                continue
            size = len(self.hub.blobs[key])
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": key}
            if kind == "lfs":
                pointer = f"oid sha256:{key}\nsize {size}\n".encode()
                entry |= {
                    "oid": self.hub.store(pointer),
                    "lfs": {"oid": key, "size": size, "pointerSize": len(pointer)},
                }
            entries.append(entry)
        if folder and not entries:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return entries

    def _resolve(self, name: str, revision: str, file: str) -> Any:
        repo = self._repository(name)
        sha = self._revision(repo, revision)
        if file not in repo.commits[sha]:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        key = repo.commits[sha][file][1]
        content = self.hub.blobs[key]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{key}"', "Accept-Ranges": "bytes"}
        if (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and self.command == "GET":
            start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], headers
        return 200, content, headers | {"Content-Length": str(len(content))}


@contextlib.contextmanager
def hub_double() -> Iterator[HubDouble]:
    """A running double with one user, alice, whose token hf_alice may write; it ends with the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = HubDouble(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    hub.add_token("hf_alice", "alice")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
