"""A server on this machine that stands for the hub and for any other, and misbehaves as it is told."""

import hashlib
import json
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Site:
    """What the server offers and how it misbehaves, and what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    statuses: list[int] = field(default_factory=list)  # error codes of the next answers
    ranges: bool = True
    lengths: bool = True  # whether answers say how long they are
    commit: str = COMMIT
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Files with ranges, and as much of the hub's interface as a download of a snapshot uses."""

    site: ClassVar[Site]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send(*self.answer())

    def do_GET(self) -> None:
        self.send(*self.answer())

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> tuple[bytes, int, dict[str, str]]:
        site, path = self.site, self.path.partition("?")[0]
        site.asked.append((self.command, path, self.headers["Range"]))
        if path.startswith("/api/models/") and "/revision/" in path:
            return json.dumps({"id": "org/model", "sha": site.commit, "siblings": []}).encode(), 200, {}
        if path.startswith("/api/models/") and "/tree/" in path:
            repository = path.partition("/tree/")[0].removeprefix("/api/models")
            return json.dumps(self.entries(f"{repository}/resolve/")).encode(), 200, {}
        if path not in site.files:
            return b"", 404, {"X-Error-Code": "EntryNotFound"}
        if self.command == "GET" and site.statuses:
            return b"", site.statuses.pop(0), {}
        body, headers = site.files[path], {"Accept-Ranges": "bytes"}
        if "/resolve/" in path:
            headers |= {"ETag": f'"{sha256(body)}"', "X-Repo-Commit": site.commit}
        asked = self.headers["Range"] if site.ranges else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start and start >= len(body):
            return b"", 416, {"Content-Range": f"bytes */{len(body)}"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return body[start:], 206 if start else 200, headers

    def entries(self, folder: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path[len(folder) :].partition("/")[2], "size": len(body), "oid": sha256(body)[:40]}
            for path, body in self.site.files.items()
            if path.startswith(folder)
        ]

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.site.lengths:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            cut = self.site.cuts.pop(0) if self.site.cuts and len(body) > self.site.cuts[0] else None
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """The connections that it cuts itself are no news."""
