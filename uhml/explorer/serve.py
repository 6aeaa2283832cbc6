"""Show one page on this machine."""

import contextlib
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from uhml.errors import UserError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"


def serve(page: Path, port: int) -> None:
    """Serve a page, and nothing else, to this machine alone, until Ctrl-C.

    Args:
        page: the file.
        port: 0 takes any that is free.

    Raises:
        UserError: the port is taken.
    """
    with server(page, port) as listening:
        logger.info("%s is at http://%s:%d/ until Ctrl-C.", page, HOST, listening.server_port)
        with contextlib.suppress(KeyboardInterrupt):
            listening.serve_forever()


def server(page: Path, port: int) -> ThreadingHTTPServer:
    """Return the server, which listens, but answers only once it is run."""
    try:
        listening = ThreadingHTTPServer((HOST, port), _handler(page))
    except (OSError, OverflowError) as e:
        raise UserError(f"--serve {port}: cannot listen there ({e}); name another port.") from e
    listening.daemon_threads = True
    return listening


def _handler(page: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            # The reader may go at any time, and browsers open connections that they never use.
            with contextlib.suppress(ConnectionError):
                super().handle()

        def do_GET(self) -> None:
            # A name that somebody else's site has made to mean this machine must not let that site read the page.
            host = self.headers.get("Host", "").partition(":")[0]
            if self.path != "/" or host not in (HOST, "localhost"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                content = page.read_bytes()
            except OSError:  # moved or removed meanwhile
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
