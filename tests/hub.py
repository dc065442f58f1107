"""A small hub on this machine, which answers as the real one does, and fails as it is told to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Request:
    """One that the hub received."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What the hub holds, how it behaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By the end of their path."""
    refuse: tuple[int, str] | None = None
    """Status and error code of every answer."""
    break_after: list[int] = field(default_factory=list)
    """Bytes after which the connection of the next downloads is cut; used up one by one."""
    hang_after: int | None = None
    """Bytes after which downloads bring nothing more, and do not end."""
    ignore_ranges: bool = False
    state_wrong_hash: bool = False
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def downloads(self, name: str) -> list[Request]:
        """Requests for the bytes of a file."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(name)]

    def digest(self, name: str) -> str:
        """As the real hub's: sha256 of large files, git's sha1 of small ones."""
        content = self.files[name]
        if self.state_wrong_hash and name.endswith(".safetensors"):
            return "0" * 64
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            name = self._note("HEAD")
            if name is None:
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hub.digest(name)}"')
            self.send_header("Content-Length", str(len(hub.files[name])))
            self.end_headers()

        def do_GET(self) -> None:
            name = self._note("GET")
            if name is None:
                return
            content, start = hub.files[name], 0
            wanted = self.headers.get("Range")
            if wanted and not hub.ignore_ranges:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self._send(name, content[start:])

        def _send(self, name: str, content: bytes) -> None:
            if name.endswith(".safetensors") and hub.break_after:
                self.wfile.write(content[: hub.break_after.pop(0)])
                self.close_connection = True
            elif name.endswith(".safetensors") and hub.hang_after is not None:
                self.wfile.write(content[: hub.hang_after])
                self.wfile.flush()
                hub.released.wait()
            else:
                self.wfile.write(content)

        def _note(self, method: str) -> str | None:
            hub.requests.append(Request(method, self.path, dict(self.headers)))
            name = self.path.rpartition("/")[2]
            status, code = hub.refuse or ((404, "EntryNotFound") if name not in hub.files else (200, ""))
            if status == 200:
                return name
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
