"""Real servers on loopback that hold a folder: plain HTTP, S3 (moto's), and the part of the Hugging Face Hub's API
that its file system uses."""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
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
