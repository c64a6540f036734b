"""The status over HTTP, for this machine unless told otherwise."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedistill.errors import Problem, RunError, SettingsError
from fedistill.report.words import clean
from fedistill.status.folder import WELL, Status, read_status
from fedistill.status.show import facts, health, page

FRESH = 1.0
"""Seconds for which the server answers from what it has just read."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Sent with every answer."""
TYPES = {"html": "text/html", "json": "application/json", "text": "text/plain"}


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT``, or ``:PORT`` for this machine alone.

    Raises:
        SettingsError: it is none of them.

    >>> address(":8090"), address("[::1]:80")
    (('127.0.0.1', 8090), ('::1', 80))
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host == f"[{bare}]"
    right = colon and port.isascii() and port.isdigit() and int(port) < 1 << 16
    if not right or (":" in bare) != bracketed:
        told = f'expected HOST:PORT, such as 127.0.0.1:8090, found "{clean(text)}"'
        raise SettingsError([Problem("--serve", told)])
    return bare or "127.0.0.1", int(port)


class Server(ThreadingHTTPServer):
    """The status over HTTP: ``/``, ``/health`` and ``/status.json``, to read and nothing else.

    Args:
        folder: a run's or a site's.
        host: where to listen; only this machine unless told otherwise.
        port: the port; 0 picks a free one.

    Raises:
        RunError: the folder has no status, or the address cannot be listened on.
    """

    def __init__(self, folder: str | Path, host: str = "127.0.0.1", port: int = 0) -> None:
        read_status(folder)
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._read: tuple[float, Status] | None = None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            told = error.strerror if isinstance(error, OSError) else "no such port"
            raise RunError(
                f"expected an address to listen on, found {clean(host)}:{port} ({told}): "
                "choose another with --serve"
            ) from None

    def server_bind(self) -> None:
        """Bind without asking a name server for our own name."""
        super(ThreadingHTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        host = self.server_name
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def status(self) -> Status:
        """The status, read at most once a second however many ask."""
        with self._lock:
            if self._read is None or time.monotonic() - self._read[0] > FRESH:
                self._read = (time.monotonic(), read_status(self.folder))
            return self._read[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up or falls silent is no error; anything else is one of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8090,
    *,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the status until SIGTERM or Ctrl-C.

    Args:
        folder: a run's or a site's.
        host: where to listen; only this machine unless told otherwise.
        port: the port; 0 picks a free one.
        ready: called with the address of the page.

    Raises:
        RunError: the folder has no status, or the address cannot be listened on.
    """
    with Server(folder, host, port) as server:
        try:
            ready(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            return


class _Handler(BaseHTTPRequestHandler):
    """Three fixed addresses; everything else is 404 or 405."""

    server: Server
    timeout = 10
    """Seconds after which a client that says nothing is let go."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in {"/", "/health", "/status.json"}:
            self._reply(HTTPStatus.NOT_FOUND, "text", "not found\n")
            return
        try:
            status = self.server.status()
        except RunError as error:
            told = json.dumps({"status": "failing", "state": "unknown", "error": str(error)})
            self._reply(HTTPStatus.SERVICE_UNAVAILABLE, "json", told + "\n")
            return
        if path == "/":
            self._reply(HTTPStatus.OK, "html", page(status))
        elif path == "/status.json":
            self._reply(HTTPStatus.OK, "json", json.dumps(facts(status), allow_nan=False) + "\n")
        else:
            well = status.state in WELL
            code = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
            self._reply(code, "json", json.dumps(health(status), allow_nan=False) + "\n")

    do_HEAD = do_GET

    def _reply(self, code: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response_only(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", f"{TYPES[kind]}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error without an echo of the request; an unknown method is 405."""
        del message, explain
        unknown = code == HTTPStatus.NOT_IMPLEMENTED
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
        self.close_connection = True
        self.request_version = self.protocol_version  # unknown where the request was malformed
        self._reply(status, "text", status.phrase.lower() + "\n")

    def log_message(self, *args: Any) -> None:
        """Requests are not logged."""
