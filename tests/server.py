"""A web server on this machine that serves bytes from memory, and fails as it is told to."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Site:
    """What is served, how, and what was asked for."""

    def __init__(self) -> None:
        """Serve nothing yet."""
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.failures: list[Any] = []
        """For the next requests, one each: an HTTP status, or after how many bytes the connection
        breaks.
        """
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range header of each request so far."""
        self.ranges = True
        """Whether Range is understood."""


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """A `Site` at ``site.url`` on the loopback interface."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.requests.append((self.path, wanted))
            failure = site.failures.pop(0) if site.failures else None
            content = site.files.get(self.path.split("?")[0].lstrip("/"))
            if content is None or isinstance(failure, Status):
                self.send_error(failure.code if isinstance(failure, Status) else 404)
                return
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            if first >= len(content) > 0:
                self.send_error(416)
                return
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content[first:failure] if failure else content[first:])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Status:
    """A failure: answer with this HTTP status."""

    def __init__(self, code: int) -> None:
        """Of this code."""
        self.code = code
