"""The HTTP server of one benchmark: serves files by exact name behind a token, and takes one response."""

import hmac
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

REQUEST_S = 60.0
"""Timeout in seconds of an idle connection."""
HEADERS = {
    # Browsers need these two for WebAssembly threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self' data:; script-src 'self' blob: 'wasm-unsafe-eval'; "
    "worker-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
TYPES = {
    "": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript", "mjs": "text/javascript",
    "json": "application/json", "wasm": "application/wasm",
}  # fmt: skip


@dataclass(slots=True)
class Exchange:
    """The files for a browser, and its response."""

    files: Mapping[str, bytes]
    """By the path after the token."""
    most_bytes: int
    """A longer response is refused."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    answer: bytes | None = None
    failure: str | None = None
    opened: bool = False
    first: threading.Lock = field(default_factory=threading.Lock)
    """Acquired by the first response, and never released."""
    done: threading.Event = field(default_factory=threading.Event)
    """Set after the page got the reply to its response."""


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server_version = "edgepack"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    exchange: Exchange

    def do_GET(self) -> None:
        name = self._allowed()
        if name is None:
            return
        content = self.exchange.files.get(name)
        if content is None:
            self._reply(404, b"not found\n")
            return
        self.exchange.opened = True
        kind = name.rpartition(".")[2] if "." in name else ""
        self._reply(200, content, TYPES.get(kind, "application/octet-stream") if kind or not name else "")

    def do_POST(self) -> None:
        name = self._allowed()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self._reply(411, b"Content-Length is missing\n")
        elif int(length) > self.exchange.most_bytes:
            self._reply(413, b"too long\n")
        elif name not in ("answer", "failure"):
            self._reply(404, b"not found\n")
        else:
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                self._take(name, body)

    def _take(self, name: str, body: bytes) -> None:
        """Take the first response; reply to the page before the server ends."""
        if not self.exchange.first.acquire(blocking=False):
            self._reply(409, b"there is an answer already\n")
            return
        if name == "answer":
            self.exchange.answer = body
        else:
            self.exchange.failure = body[:500].decode(errors="replace")
        self._reply(200, b"ok\n")
        self.exchange.done.set()

    def _allowed(self) -> str | None:
        """The path after the token; ``None``, and a reply 403, for a request without the token."""
        token, _, name = urlsplit(self.path).path.lstrip("/").partition("/")
        if hmac.compare_digest(token.encode(), self.exchange.token.encode()):
            return name
        self._reply(403, b"wrong token: open the address that edgepack printed\n")
        return None

    def _reply(self, status: int, content: bytes, kind: str = "text/plain") -> None:
        self.close_connection = self.close_connection or status >= 400
        self.send_response(status)
        for key, value in HEADERS.items():
            self.send_header(key, value)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the token is part of the path."""


class Server(ThreadingHTTPServer):
    """Serves one exchange; its threads end with the process."""

    daemon_threads = True

    def __init__(self, host: str, port: int, exchange: Exchange) -> None:
        handler = type("Handler", (_Handler,), {"exchange": exchange})
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore it: a browser may close a connection."""
