"""A small Hugging Face Hub on 127.0.0.1: what the client of `huggingface_hub` uses to make, fill and read models.

The packages hf-local-hub (its wheel holds no server) and olah (a mirror that only reads) do not serve for pushes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import transformers.utils.hub
from huggingface_hub import constants

WRITER, READER = "hf_mayWriteAndRead0123456789", "hf_mayOnlyRead0123456789"
OWNER = "ann"
_LFS = (".safetensors", ".bin", ".arrow", ".pt")


@dataclass
class Repo:
    """A repository: files by branch, and what was committed."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)  # branch, message, paths

    def sha(self, revision: str) -> str:
        """The commit of a branch: a digest of its files."""
        files = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in self.files(revision).items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes]:
        if revision in self.branches:
            return self.branches[revision]
        return next(files for branch, files in self.branches.items() if self.sha(branch) == revision)


@dataclass
class Fault:
    """What goes wrong: the next `times` requests that match are answered with `status`; 0 breaks the connection."""

    pattern: str
    status: int
    times: int = 10**6
    text: str = ""


class Hub:
    """The state of the server, for tests to look at and to spoil."""

    def __init__(self, url: str):
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def paths(self, repo_id: str, branch: str = "main") -> list[str]:
        return sorted(self.repos[repo_id].branches[branch])

    def uploaded(self) -> set[str]:
        """Every path of every commit of every repository, and those that were merely asked for."""
        return {path for repo in self.repos.values() for _, _, paths in repo.commits for path in paths}

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve(body)

    do_PUT = do_POST

    def _serve(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault is not None:
            if fault.status == 0:
                self.close_connection = True
                self.connection.close()
                return
            self._answer(fault.status, {"error": fault.text}, {"X-Error-Message": fault.text or "as the test wants"})
            return
        with self.hub.lock:
            self._route(path, body)

    def _answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token == WRITER:
            return True
        known = self._token == READER
        self._answer(403 if known else 401, {"error": "no"}, {"X-Error-Message": "no right to write"})
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token not in (WRITER, READER)):
            self._answer(404 if self._token else 401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            known = self._token in (WRITER, READER)
            self._answer(200 if known else 401, {"name": OWNER, "type": "user", "orgs": []} if known else {})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path):
            self._write(*match.groups(), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.objects[match[1]] = body
            self._answer(200)
        elif path == "/verify":
            wanted = json.loads(body)
            found = self.hub.objects.get(wanted["oid"])
            fits = found is not None and len(found) == wanted["size"] and _sha256(found) == wanted["oid"]
            if fits:
                self.hub.verified.add(wanted["oid"])
            self._answer(200 if fits else 422)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*match.groups())
        else:
            self._answer(404, {"error": f"the test server knows no {path}"})

    def _create(self, wanted: dict[str, Any]) -> None:
        if not self._may_write():
            return
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if not name.startswith(f"{OWNER}/"):
            self._answer(403, {"error": "no"}, {"X-Error-Message": "not your namespace"})
            return
        status = 409 if name in self.hub.repos else 200
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos.setdefault(name, Repo(private))
        self._answer(status, {"url": f"{self.hub.url}/{name}", "name": name, "error": "exists"})

    def _write(self, name: str, kind: str, revision: str, body: bytes) -> None:
        if not self._may_write():
            return
        repo = self._repo(name)
        if repo is None:
            return
        if revision not in repo.branches:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "preupload":
            files = repo.branches[revision]
            self._answer(200, {"files": [_mode(file, files) for file in json.loads(body)["files"]]})
        else:
            self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repo: Repo, revision: str, operations: list[dict[str, Any]]) -> None:
        content, message = {}, ""
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.verified:
                    self._answer(422, {"error": f"{value['path']} was not uploaded"})
                    return
                content[value["path"]] = self.hub.objects[value["oid"]]
        is_request = "create_pr=1" in self.path
        branch = f"refs/pr/{len(repo.branches)}" if is_request else revision
        repo.branches[branch] = {**repo.branches[revision], **content}
        repo.commits.append((branch, message, sorted(content)))
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha(branch)}", "commitOid": repo.sha(branch)}
        if is_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._answer(200, answer)

    def _batch(self, wanted: dict[str, Any]) -> None:
        if not self._may_write():
            return
        objects = []
        for entry in wanted["objects"]:
            oid = entry["oid"]
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}},
                "verify": {"href": f"{self.hub.url}/verify", "header": {}},
            }
            objects.append({**entry, **({} if oid in self.hub.verified else {"actions": actions})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        try:
            files = repo.files(revision)
        except StopIteration:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            return
        commit = {"X-Repo-Commit": repo.sha(revision) if revision in repo.branches else revision}
        if path not in files:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", **commit})
            return
        self._answer(200, files[path], {"ETag": f'"{_sha256(files[path])}"', **commit})

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            siblings = [{"rfilename": path} for path in sorted(repo.files(revision))]
            sha = repo.sha(revision) if revision in repo.branches else revision
            self._answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            self._answer(200, [_entry(path, data) for path, data in sorted(repo.files(revision).items())])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(_LFS):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 100}
    return entry


def _mode(file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    path, is_large = file["path"], file["path"].endswith(_LFS)
    answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if path in files:
        answer["oid"] = _sha256(files[path]) if is_large else _git_oid(files[path])
    return answer


@contextmanager
def serving() -> Iterator[Hub]:
    """A server for the length of a block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_to(url: str, cache: Any, put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Makes the server the Hub of this process, which has imported the client already.

    Args:
        url: of the server.
        cache: folder of downloads.
        put: how an attribute is set, e.g. so that it is set back.
    """
    put(constants, "ENDPOINT", url)
    put(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    put(constants, "HF_HUB_OFFLINE", False)
    put(constants, "HF_HUB_DISABLE_XET", True)
    put(constants, "HF_HUB_CACHE", str(cache))
    put(transformers.utils.hub, "_hf_api", None)


def settings_for(hub: Hub, home: Any, token: str | None = WRITER) -> dict[str, str]:
    """The environment of a process that uses the server as its Hub, with caches of its own."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return settings if token is None else {**settings, "HF_TOKEN": token}
