"""A stand-in for the Hub on this machine: repositories in memory, and what huggingface_hub asks.

with HubServer() as hub:
    hub.commit("user/name", {"README.md": b"..."}, revision="main")
    ... whatever asks `hub.address`
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "standin" * 5


@dataclass
class Repository:
    """The files of each commit, and which of them each branch or tag names."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def sha(self, revision: str) -> str | None:
        """Return the commit that a revision names."""
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """The server, which runs within the context."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.failing: int | None = None
        self.rejected_card: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, b"")

            do_HEAD = do_GET

            def do_POST(self) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.answer(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit that holds these files, and those of the commit before it."""
        repository = self.repositories.setdefault(name, Repository())
        before = repository.commits.get(repository.sha(revision) or "", {})
        files = {**before, **files}
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[sha] = files
        repository.refs[revision] = sha
        return sha

    # --------------------------------------------------------------------------------- answers

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        """Answer a request."""
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        may = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        code, headers, content = self._answered(request.command, path, body, may)
        request.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _answered(
        self, command: str, path: str, body: bytes, may: bool
    ) -> tuple[int, dict[str, str], bytes]:
        if self.failing is not None:
            return self.failing, {}, b""
        if path == "/api/validate-yaml":
            if self.rejected_card is not None:
                return _json({"errors": [{"message": self.rejected_card}], "warnings": []}, 400)
            return _json({"errors": [], "warnings": []})
        if command == "POST" and not may:
            return _error(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "user"
            if owner not in ("user", "team"):
                return _error(403, "", "You don't have the rights to create a model there.")
            name = f"{owner}/{asked['name']}"
            if name in self.repositories:
                return _json({"error": "exists", "url": f"{self.address}/{name}"}, 409)
            is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.repositories[name] = Repository(is_private)
            self.commit(name, {".gitattributes": b""})
            return _json({"url": f"{self.address}/{name}", "name": name})
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.+))?)?", path)
        plain = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", path)
        name = (api or plain or [None, ""])[1]
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not may):
            return _error(404 if may else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not may and (plain or (api and api[2] == "tree")):
            return _error(403, "GatedRepo", "Access is restricted")
        if api:
            return self._of_repository(name, repository, command, api, body)
        assert plain is not None
        sha = repository.sha(plain[2])
        if sha is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        content = repository.commits[sha].get(plain[3])
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}, content

    def _of_repository(
        self, name: str, repository: Repository, command: str, api: Any, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        what, rest = api[2], api[3] or "main"
        if what == "branch":
            repository.refs.setdefault(rest, repository.refs["main"])
            return _json({})
        sha = repository.sha(rest)
        if sha is None and what == "tree" and repository.sha(rest.rpartition("/")[0]):
            return _error(404, "EntryNotFound", f"No such folder: {rest}")
        if sha is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        files = repository.commits[sha]
        if what == "preupload":
            listed = json.loads(body)["files"]
            return _json({"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in listed]})  # fmt: skip
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            oid = self.commit(name, added, rest)
            url = f"{self.address}/{name}/commit/{oid}"
            return _json({"commitUrl": url, "commitOid": oid, "hookOutput": ""})
        if what == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content),
                 "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]  # fmt: skip
            return _json(entries)
        return _json(
            {
                "id": name,
                "sha": sha,
                "siblings": [{"rfilename": path} for path in files],
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )


def _json(value: Any, code: int = 200) -> tuple[int, dict[str, str], bytes]:
    return code, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(code: int, kind: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message, **({"X-Error-Code": kind} if kind else {})}
    return code, headers, json.dumps({"error": message}).encode()
