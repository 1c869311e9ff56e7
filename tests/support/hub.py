"""Serve a model hub on loopback. It speaks as much of the Hugging Face hub's HTTP protocol as an upload needs, without Xet."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN = "hf_" + "sEcReT" * 5
LARGE = 2_000
"""A file of so many bytes or more is uploaded by itself, as weights are."""


@dataclass
class Hub:
    endpoint: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """The bytes of each file, by repository, branch and path."""
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded objects by their SHA-256."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """The messages of the commits."""
    fault: Callable[[str, str], int | str | None] = lambda method, path: None
    """Gives a request's fault by method and path: a status, ``drop`` for a broken connection, or None for the usual answer."""

    def count(self, method: str, pattern: str = "") -> int:
        return sum(used == method and re.search(pattern, path) is not None for used, path in self.requests)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((method, path))
        fault = self.hub.fault(method, path)
        if fault == "drop":
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(fault, int):
            # Answer like a server that repeats what it was sent, including the token.
            return self.send(fault, {"error": f"refused {self.headers.get('Authorization')}\nfor a reason"})
        if not path.startswith("/large/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        for pattern, act in ROUTES:
            if (method, match := re.fullmatch(pattern[1], path))[0] == pattern[0] and match:
                return act(self, body, *match.groups())
        return self.send(404, {"error": f"no {method} {path} here"})

    def send(self, status: int, value: dict | None = None) -> None:
        data = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        there = repo in self.hub.repos
        if not there:
            self.hub.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
            self.hub.private[repo] = wanted.get("visibility") == "private"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        self.send(*((409, url | {"error": "You already created this model repo"}) if there else (200, url)))

    def info(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.send(404, {"error": "Repository not found"})
        return self.send(200, {"id": repo, "sha": "0" * 40, "private": self.hub.private[repo], "siblings": []})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo]
        if branch in branches:
            return self.send(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        return self.send(200)

    def validate(self, body: bytes) -> None:
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        if head["license"] not in ("openrail++", "creativeml-openrail-m", "other"):
            return self.send(400, {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []})
        return self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, branch: str) -> None:
        present = self.hub.repos[repo][branch]
        files = []
        for file in json.loads(body)["files"]:
            large = file["size"] >= LARGE
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if file["path"] in present:
                data = present[file["path"]]
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                files[-1]["oid"] = hashlib.sha256(data).hexdigest() if large else git
        self.send(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.large:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{one['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "not these bytes"})
        self.hub.large[oid] = body
        return self.send(200)

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        files = dict(self.hub.repos[repo][branch])
        for line in body.splitlines():
            value = (item := json.loads(line))["value"]
            if item["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                return self.send(400, {"error": f"no {item['key']} here"})
        self.hub.repos[repo][branch] = files
        return self.send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/abc", "commitOid": "abc"})


REPO = "([^/]+/[^/]+)"
ROUTES = [
    (("POST", "/api/repos/create"), _Handler.create),
    (("GET", f"/api/models/{REPO}(?:/revision/.+)?"), _Handler.info),
    (("POST", f"/api/models/{REPO}/branch/(.+)"), _Handler.branch),
    (("POST", "/api/validate-yaml"), _Handler.validate),
    (("POST", f"/api/models/{REPO}/preupload/(.+)"), _Handler.preupload),
    (("POST", rf"/{REPO}\.git/info/lfs/objects/batch"), _Handler.batch),
    (("PUT", "/large/([0-9a-f]+)"), _Handler.put),
    (("POST", f"/api/models/{REPO}/commit/(.+)"), _Handler.commit),
]
