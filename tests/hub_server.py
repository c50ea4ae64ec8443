"""
A Hub in memory, over HTTP: the part of the Hub's API that `create_repo`, `upload_folder`, `push_to_hub`,
`hf_hub_download`, `snapshot_download` and `from_pretrained` use, written against huggingface_hub 2.4.

Files go through the LFS route (Xet must be off in the client: `HF_HUB_DISABLE_XET=1`). Reading is open to all, writing
needs the token. Every request is kept in `HubServer.requests`.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_test"
USER = "tester"
DATE = "2025-04-24T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".parquet", ".arrow", ".npz", ".png", ".mp4", ".pt")
LFS_SIZE = 10_000_000


@dataclass
class File:
    """A file of a commit; its `oid` is git's for small files and the sha256 for LFS files."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def as_json(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    """Branches point at commits; a commit is the whole mapping from path to file."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        listing = json.dumps([len(self.commits), title, {path: file.oid for path, file in files.items()}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class HubError(Exception):
    """Ends a request with a status and the Hub's `X-Error-Code` header."""

    def __init__(self, status: int, code: str, message: str, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class HubServer:
    """The state of the Hub and the ways to reach it: `url` and `run()`."""

    def __init__(self, home: Path):
        self.home = home
        self.repos: dict[tuple[str, str], Repo] = {}  # keyed by ("models" or "datasets", "owner/name")
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """The files a repository holds, for assertions."""
        repo = self.repo(kind, repo_id)
        return {path: file.data for path, file in repo.commits[repo.resolve(revision)].items()}

    def env(self) -> dict[str, str]:
        """Variables that send a Python process to this Hub, with its own cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(self.home),
            "HF_MODULES_CACHE": str(self.home / "modules"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def run(self, script: str, timeout: float = 120) -> str:
        """
        Run a Python snippet in another process against this Hub and return what it printed. That process is forked
        from one that has imported what we stand on, and nothing of ours, under the variables of `env()`:
        `huggingface_hub` reads them at import, and the import takes far longer than most snippets.
        """
        outputs = [self.home / "stdout", self.home / "stderr"]
        process = FORKS.Process(target=_run_snippet, args=(textwrap.dedent(script), self.home, *outputs))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        printed, errors = (path.read_text() for path in outputs)
        assert process.exitcode == 0, f"the snippet failed with {process.exitcode}:\n{printed}\n{errors}"
        return printed

    def reset(self) -> None:
        """Forget every repository and request, and what clients have cached."""
        for state in (self.repos, self.blobs, self.requests):
            state.clear()
        shutil.rmtree(self.home)
        self.home.mkdir()


FORKS = multiprocessing.get_context("forkserver")


def _run_snippet(script: str, home: Path, *outputs: Path) -> None:
    os.chdir(home)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    exec(compile(script, "<snippet>", "exec"), {"__name__": "__main__"})  # noqa: S102


@contextmanager
def serve(home: Path) -> Iterator[HubServer]:
    """Serve a new, empty Hub from a thread; `home` becomes the client's HF_HOME. One at a time in a process."""
    hub = HubServer(home)
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    FORKS.set_forkserver_preload(["peft", "transformers.pipelines", "trl.trainer.dpo_trainer", "evaluate"])
    with mock.patch.dict(os.environ, hub.env()):
        forkserver.ensure_running()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "commits"),
        ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"(/(?P<kind>datasets))?/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", rf"(/(?P<kind>datasets))?/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]
]
_OPEN = {"paths_info", "lfs_put", "validate_yaml"}  # the other methods that write need the token


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
            try:
                name, match = self._route(method, url.path)
                if method != "GET" and name not in _OPEN and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    raise HubError(401, "Unauthorized", "Invalid username or password.")
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in parts:
                    parts.setdefault("kind", "models")
                getattr(self, name)(**parts)
            except HubError as error:
                self._json(error.body, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    @staticmethod
    def _route(method: str, path: str) -> tuple[str, re.Match]:
        for route_method, pattern, name in _ROUTES:
            if route_method == method and (match := pattern.fullmatch(path)):
                return name, match
        raise HubError(404, "NotFound", f"The test Hub has no {method} {path}")

    def whoami(self):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def create_repo(self):
        kind, repo_id, payload = self._named_repo()
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, "Conflict", "You already created this repo", url=url)
        self.hub.repos[kind, repo_id] = Repo(private=payload.get("visibility") == "private")
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self):
        kind, repo_id, _ = self._named_repo()
        self.hub.repo(kind, repo_id)
        del self.hub.repos[kind, repo_id]
        self._json({})

    def info(self, kind, repo_id, revision="main"):
        repo = self.hub.repo(kind, repo_id)
        sha = repo.resolve(revision)
        siblings = [
            {"rfilename": path, "size": len(file.data), "blobId": file.oid} for path, file in repo.commits[sha].items()
        ]
        owner = repo_id.split("/")[0]
        self._json(
            {"id": repo_id, "author": owner, "sha": sha, "private": repo.private, "gated": False, "tags": []}
            | {"lastModified": DATE, "createdAt": DATE, "siblings": siblings}
        )

    def tree(self, kind, repo_id, revision, path=""):
        repo = self.hub.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        root = path and f"{path}/"
        inside = {name: file for name, file in files.items() if name.startswith(root)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for name, file in inside.items():
            parts = name.removeprefix(root).split("/")
            folders = [root + "/".join(parts[:depth]) for depth in range(1, len(parts))]
            for folder in folders if recursive else folders[:1]:
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or not folders:
                entries[name] = file.as_json(name)
        self._json(list(entries.values()))

    def paths_info(self, kind, repo_id, revision):
        repo = self.hub.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._json([files[path].as_json(path) for path in paths if path in files])

    def refs(self, kind, repo_id):
        branches = self.hub.repo(kind, repo_id).branches
        names = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
        self._json({"branches": names, "converts": [], "tags": [], "pullRequests": []})

    def commits(self, kind, repo_id, revision):
        repo = self.hub.repo(kind, repo_id)
        repo.resolve(revision)
        commits = [{"id": sha, "title": title, "message": "", "date": DATE} for sha, title in repo.titles.items()]
        self._json([{**commit, "authors": [{"user": USER}]} for commit in reversed(commits)])

    def create_branch(self, kind, repo_id, branch):
        repo = self.hub.repo(kind, repo_id)
        if branch in repo.branches:
            raise HubError(409, "Conflict", f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(self.body).get("startingPoint", "main"))
        self._json({})

    def preupload(self, kind, repo_id, revision):
        repo = self.hub.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] >= LFS_SIZE
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            answer[-1]["oid"] = files[path].oid if path in files else None
        self._json({"files": answer, "commitOid": repo.resolve(revision)})

    def commit(self, kind, repo_id, revision):
        repo = self.hub.repo(kind, repo_id)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repo.resolve(revision)):
            raise HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.resolve(revision)])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise HubError(400, "BadRequest", f"LFS pointer of {path} points to a file that was not uploaded")
                files[path] = File(self.hub.blobs[value["oid"]], lfs=True)
            else:  # deletedFile, deletedFolder
                files = {
                    name: file for name, file in files.items() if not f"{name}/".startswith(f"{path.rstrip('/')}/")
                }
        answer = {"success": True}
        if "create_pr" in self.query:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        sha = repo.commit(revision, files, header["value"]["summary"])
        self._json({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def lfs_batch(self, kind, repo_id):
        self.hub.repo(kind, repo_id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", "The content does not match its sha256")
        self.hub.blobs[oid] = self.body
        self._json({})

    def resolve(self, kind, repo_id, revision, path):
        repo = self.hub.repo(kind, repo_id)
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            raise HubError(404, "EntryNotFound", "Entry not found")
        file = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        data, status = file.data, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(data, status, {"Content-Type": "application/octet-stream", **headers})

    def _named_repo(self) -> tuple[str, str, dict]:
        payload = json.loads(self.body)
        owner = payload.get("organization") or USER
        return f"{payload.get('type', 'model')}s", f"{owner}/{payload['name']}", payload

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, content: dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        """Keeps the test output quiet."""
