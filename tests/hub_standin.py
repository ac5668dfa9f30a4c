"""A stand-in for the Hub's HTTP API on 127.0.0.1: enough to create, fill, change and download a model repository.

Speaks what `huggingface_hub` speaks with LFS (`HF_HUB_DISABLE_XET=1`). Requests can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_a_secret_that_must_not_be_shown"


@dataclass
class Failure:
    """Requests that fail: those whose method and path match, after the first `after` of them, `times` of them."""

    pattern: str
    status: int | None
    """HTTP status, or None: the connection is dropped without an answer."""
    times: int = 10**9
    after: int = 0
    apply: bool = False
    """Do what was asked for first, so that only the answer is lost."""


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub:
    """The server and its state, as a context manager."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.seen_by_others: list[tuple[str, ...]] = []
        """The file names of public repositories after every request."""
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def sent(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets

    def log_message(self, *_):
        pass

    def handle_one(self):
        hub = self.state
        line = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append(line)
            failure = next((f for f in hub.failures if re.search(f.pattern, line)), None)
            failing = False
            if failure is not None:
                failure.after -= 1
                failing = failure.after < 0 < failure.times
                failure.times -= failing
            if failing and not failure.apply:
                answer = (failure.status, {"error": "it is broken"})
            else:
                answer = self.answer(self.path.partition("?")[0], body)
                if failing:
                    answer = (failure.status, {"error": "it is broken"})
            hub.seen_by_others += [tuple(sorted(r.files)) for r in hub.repositories.values() if not r.private]
        if answer[0] is None:
            self.close_connection = True
            self.connection.close()
            return
        self.reply(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def reply(self, status, content=None, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self, path, body):
        """(status, content, headers) of a request."""
        hub = self.state
        mine = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/blob/") and self.command == "PUT":  # storage: its address is the permission
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "checksum"}
            hub.blobs[oid] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.command in ("POST", "PUT") and not mine:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            url = {"url": f"{hub.url}/{name}"}
            if name in hub.repositories:
                return 409, {**url, "error": "You already created this model repo"}
            hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
            return 200, url
        found = re.match(r"^(?:/api/models)?/([^/]+/[^/.]+)(?:\.git)?(?:/(.*))?$", path)
        name, rest = (found[1], found[2] or "") if found else ("", "")
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not mine):
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self.in_repository(name, repository, rest, body)

    def in_repository(self, name, repository, rest, body):
        hub = self.state
        action, _, rest = rest.partition("/")
        if action in ("", "revision"):
            return 200, {"id": name, "modelId": name, "sha": repository.sha, "private": repository.private}
        if action == "tree":
            return 200, [
                {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
                for path, data in sorted(repository.files.items())
            ]
        if action == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [self.preuploaded(repository, one["path"]) for one in asked]}
        if action == "info":  # info/lfs/objects/batch, and verify
            wanted = json.loads(body)
            if rest.endswith("verify"):
                return 200, {}
            upload = {"href": f"{hub.url}/blob/"}
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**one, **({} if one["oid"] in hub.blobs else {"actions": {"upload": _at(upload, one["oid"])}})}
                    for one in wanted["objects"]
                ],
            }
        if action == "commit":
            return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if action == "settings":
            repository.private = json.loads(body)["visibility"] == "private"
            return 200, {}
        if action == "resolve":
            path = rest.partition("/")[2]
            if path not in repository.files:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            data = repository.files[path]
            return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repository.sha}
        return 404, {"error": f"the stand-in knows no {action!r}"}

    def preuploaded(self, repository, path):
        large = path.endswith((".safetensors", "tokenizer.json"))
        old = repository.files.get(path)
        oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def commit(self, name, repository, operations):
        hub = self.state
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return 400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}
                files[value["path"]] = hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files, repository.commits = files, repository.commits + 1
        return 200, {"commitUrl": f"{hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}

    def validate(self, content):
        """The Hub's check of a card: its metadata is a mapping, and its `model-index` has what it must have."""
        parts = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(parts[1]) if parts else None
            for model in metadata.get("model-index", []):
                assert isinstance(model["name"], str)
                for result in model["results"]:
                    assert isinstance(result["task"]["type"], str)
                    assert isinstance(result["dataset"]["type"], str)
                    assert isinstance(result["dataset"]["name"], str)
                    assert all(isinstance(metric["type"], str) and "value" in metric for metric in result["metrics"])
            assert isinstance(metadata["license"], str)
        except (AssertionError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
            return 400, {"errors": [{"message": f"invalid metadata: {error!r}"}], "warnings": []}
        return 200, {"errors": [], "warnings": []}


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _at(action, oid):
    return {**action, "href": action["href"] + oid}
