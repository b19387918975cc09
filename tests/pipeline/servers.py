"""Real servers on loopback that hold a folder: plain HTTP, S3 (moto's), and the part of the Hugging Face Hub's API
that its file system uses."""

from __future__ import annotations

import functools
import json
import urllib.parse
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0" * 40


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler] | functools.partial[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class PlainHandler(SimpleHTTPRequestHandler):
    """Python's own, as `python -m http.server` has it: no listing that we use, no ranges."""

    requested: list[str]

    def do_GET(self) -> None:
        type(self).requested.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def plain_http(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """An address, and the paths that were asked for."""
    handler = type("Handler", (PlainHandler,), {"requested": []})
    with serving(functools.partial(handler, directory=str(folder))) as address:
        yield address, handler.requested


class HubHandler(BaseHTTPRequestHandler):
    """One dataset repository, `team/caches`."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def _send(self, code: int, data: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path).split("?")[0]
        _, _, listed = path.partition("/tree/main")
        _, _, resolved = path.partition("/resolve/main/")
        if path.startswith("/api/datasets/team/caches") and "/tree/" in path:
            folder = self.folder / listed.strip("/")
            if folder.is_dir():
                return self._json([self._entry(child) for child in sorted(folder.iterdir())])
        elif path.startswith("/api/datasets/team/caches"):
            return self._json({"_id": "1", "id": "team/caches", "sha": COMMIT, "private": False, "tags": []})
        elif resolved and (self.folder / resolved).is_file():
            return self._file((self.folder / resolved).read_bytes())
        return self._send(404, b'{"error": "Entry not found"}', X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 – the library's name

    def _entry(self, path: Path) -> dict[str, object]:
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        return {"path": str(path.relative_to(self.folder)), "oid": COMMIT, **kind}

    def _file(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, data, ETag='"1"', X_Repo_Commit=COMMIT)
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self._send(206, part, ETag='"1"', X_Repo_Commit=COMMIT, Content_Range=span)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The endpoint of a Hub with one repository, whose files are those of a folder."""
    with serving(type("Handler", (HubHandler,), {"folder": folder})) as address:
        yield address


class ModelHubHandler(BaseHTTPRequestHandler):
    """Repositories, each a folder, those of Spaces and data sets in `spaces/` and `datasets/`: made, committed to,
    listed, read; not `refused/`."""

    protocol_version = "HTTP/1.1"
    folder: Path
    address: str
    commits: list[dict[str, object]]

    _send = HubHandler._send
    _json = HubHandler._json

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        path, body = urllib.parse.unquote(self.path).split("?")[0], self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_secret" or b"refused" in body:
            return self._send(403, b'{"error": "you may not"}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if asked.get("type") == "dataset" or (asked.get("type") == "space" and asked["sdk"] == "static"):
                name = f"{asked['type']}s/{name}"
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"{self.address}/{name}"})
        name = repository_of(path)
        if path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.commits.append(line["value"])
                else:
                    committed = self.folder / name / line["value"]["path"]
                    committed.parent.mkdir(parents=True, exist_ok=True)
                    committed.write_bytes(b64decode(line["value"]["content"]))
            url = f"{self.address}/{name}/commit/{COMMIT}"
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._send(404, b'{"error": "no such page"}')

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path).split("?")[0]
        name = repository_of(path)
        _, _, resolved = path.partition("/resolve/")
        repository, file = self.folder / name, self.folder / name / resolved.partition("/")[2]
        if not repository.is_dir():
            return self._send(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        if path.startswith("/api/") and "/tree/" in path:
            inside = repository / path.partition("/tree/main")[2].strip("/")
            if not inside.is_dir():
                return self._send(404, b'{"error": "Entry not found"}', X_Error_Code="EntryNotFound")
            everything = "recursive=true" in self.path.lower()
            return self._json(
                [entry_of(p, repository) for p in sorted(inside.rglob("*") if everything else inside.iterdir())]
            )
        if path.startswith("/api/"):
            siblings = [{"rfilename": child.name} for child in listed(repository)]
            return self._json(
                {"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            )
        if resolved and file.is_file():
            data = file.read_bytes()
            return self._send(200, data, ETag=f'"{sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self._send(404, b'{"error": "Entry not found"}', X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 – the library's name

    def log_message(self, *_: object) -> None:
        pass


def repository_of(path: str) -> str:
    """The folder of the repository that a request is about."""
    parts = path.removeprefix("/api/models").removeprefix("/api").strip("/").split("/")
    return "/".join(parts[: 3 if parts[0] in ("spaces", "datasets") else 2])


def entry_of(path: Path, repository: Path) -> dict[str, object]:
    """A file or folder as the Hub lists it, a file by git's own name of its bytes."""
    name = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT}
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


@contextmanager
def model_hub(folder: Path) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The endpoint of a Hub whose model repositories are folders, and the headers of its commits."""
    handler = type("Handler", (ModelHubHandler,), {"folder": folder, "commits": []})
    with serving(handler) as address:
        handler.address = address
        yield address, handler.commits
